"""Plans from a survey on disk, and plan files that remember their survey. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.allocate.plan import Plan
from spectrim.errors import ArtifactError, OutputError
from spectrim.run.sources import sources_of
from spectrim.storage.ownership import check_apart
from spectrim.storage.plan_file import FORMAT_VERSION, check_model, load_plan
from spectrim.storage.survey_file import is_survey, load_survey
from spectrim.storage.survey_record import Survey
from spectrim.storage.whole_file import check_file

if TYPE_CHECKING:
    from spectrim.run.loading import LoadedModel


def plan_record(plan: Plan, survey: Survey | str | Path) -> dict[str, Any]:
    """A plan as JSON-ready data that says whose it is, and which survey has its decompositions."""
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, **plan.to_json()}
    if not isinstance(survey, Survey):
        return {**record, "survey": str(Path(survey).resolve())}
    return {
        **record,
        "survey": None if survey.folder is None else str(survey.folder.resolve()),
        "model": survey.model_name,
        "identity": None if survey.key is None else survey.key.model,
    }


def check_plan_file(output: str | Path, survey: str | Path, *, overwrite: bool) -> None:
    """Refuse to write a plan where something else lies, before it is made.

    Raises:
        OutputError: the file is not a plan, may not be replaced, or lies in the survey.
    """
    check_apart(output, sources_of(survey=survey))
    path = check_file(output, overwrite=overwrite, option="FILE")
    if path.exists():
        try:
            load_plan(path)
        except ArtifactError as error:
            raise OutputError(f"{path} is no plan and is not replaced: {error}") from error


def bring_plan(
    plan: Plan | str | Path | None, loaded: LoadedModel
) -> tuple[Plan | None, Survey | None]:
    """The user's plan for a loaded model, with its survey; see `read_plan`.

    Raises:
        ArtifactError: also where the file was made for another model.
    """
    if plan is None or isinstance(plan, Plan):
        return plan, None
    check_model(plan, loaded)
    return read_plan(plan)


def read_plan(path: str | Path) -> tuple[Plan, Survey | None]:
    """A plan file, and its survey where that still lies where it was.

    Raises:
        ArtifactError: the file is not a plan, or the survey is damaged.
    """
    plan, folder = load_plan(path)
    if folder is not None and is_survey(folder):
        return plan, load_survey(folder)
    return plan, None

"""What is read from surveys, models and results; nothing here changes a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from spectrim.allocate.plan import Plan
from spectrim.api.evaluating import evaluate_models
from spectrim.run.planning import plan_from_survey
from spectrim.run.reading_words import EvaluateWords, PlanWords
from spectrim.run.word import takes
from spectrim.shortage import tells_of_shortage
from spectrim.storage.survey_file import load_survey
from spectrim.storage.survey_record import Survey

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(PlanWords)
def plan(survey: Survey | str | Path, **words: Unpack[PlanWords]) -> Plan:
    """Ranks for any size from a survey, in about a second.

    Args:
        survey: in memory, or its folder.
        **words: those below.

    Raises:
        BudgetError: out of reach; names what can be reached.
        InputError: the survey lacks what the rule needs.
    """
    found = survey if isinstance(survey, Survey) else load_survey(survey)
    return plan_from_survey(found, **words)


@tells_of_shortage
@takes(EvaluateWords)
def evaluate(model: str | Path | nn.Module, **words: Unpack[EvaluateWords]) -> dict[str, Any]:
    """Perplexity with its protocol, and bytes; see `api.evaluating.evaluate_models`."""
    return evaluate_models([model], **words)[-1]


@tells_of_shortage
def export(
    folder: str | Path, *, output: str | Path, to: str = "dense", overwrite: bool = False
) -> Path:
    """Write a compressed folder for other tools; see `storage.export.export_folder`."""
    from spectrim.storage.export import export_folder

    return export_folder(folder, output, to=to, overwrite=overwrite)


def inspect(folder: str | Path) -> dict[str, Any]:
    """Ranks, shapes and bytes of a folder from its headers alone."""
    from spectrim.storage.inspect import inspect_folder

    return inspect_folder(folder).summary()

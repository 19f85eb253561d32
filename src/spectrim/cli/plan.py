"""`spectrim plan`: ranks for any size from a survey, without touching the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.run.reading_words import PlanWords

if TYPE_CHECKING:
    from spectrim.allocate.plan import Plan


@takes(
    *("keep", "size", "rule", "score", "floor", "multiple"),
    of=PlanWords,
    told=("as_json", "verbose"),
)
def plan(
    terminal: Terminal,
    survey: Annotated[Path, typer.Argument(metavar="SURVEY", help="What `spectrim survey` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="JSON for `compress --plan FILE`."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE if it exists.")
    ] = False,
    every: options.Every = False,
    **words: Any,
) -> None:
    """Choose ranks for a size from a survey.

    Prints ranks, bytes and predicted loss, and what is kept along depth.
    """
    with terminal.working(output=output):
        # Not through the interface module: that one imports torch, which takes longer than a plan.
        from spectrim.run.planning import plan_from_survey
        from spectrim.run.survey.replanning import check_plan_file, plan_record
        from spectrim.storage.json_file import as_json
        from spectrim.storage.survey_file import load_survey
        from spectrim.storage.whole_file import write_text

        if output is not None:
            check_plan_file(output, survey, overwrite=overwrite)
        surveyed = load_survey(survey)
        made = plan_from_survey(surveyed, **options.given(**words))
        if output is not None:
            write_text(output, as_json(plan_record(made, surveyed)))
    terminal.show(made.to_json(), lambda _: print_plan(made, output, every=every))


def print_plan(made: Plan, output: Path | None, *, every: bool) -> None:
    """Print ranks along the depth, by projection or all of them, and what they come to."""
    from spectrim.cli.summary import print_plan_summary
    from spectrim.cli.target_tables import (
        print_heat_map,
        print_projections,
        print_targets,
        rows_of_plan,
    )

    rows = rows_of_plan(made)
    (print_targets if every else print_projections)(rows)
    print_heat_map(rows)
    print_plan_summary(made, output=output)

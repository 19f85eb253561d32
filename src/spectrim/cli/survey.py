"""`spectrim survey`: moments, spectra and scores of every target, once, for any number of plans."""

from __future__ import annotations

from typing import Any

from spectrim.cli import options
from spectrim.cli.study import names
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import CALIBRATING, takes


@takes(
    *("scores", "recipe", "only", "skip", *CALIBRATING, "batch", "bos", "device", "dtype"),
    *("out_of_core", "trust_remote_code", "dequantize", "overwrite"),
)
def survey(
    terminal: Terminal,
    model: options.Model,
    output: options.Output,
    **words: Any,
) -> None:
    """Measure MODEL once, for any number of plans.

    OUT holds moments, spectra and scores of every target; `spectrim plan OUT` reads it.
    """
    from spectrim.cli.crew import answer_at_once, crew

    answer_at_once(words)
    with (
        terminal.working(output=output, resumes=True) as progress,
        crew(words["device"], progress) as team,
    ):
        from spectrim import api

        words["scores"] = names(words["scores"])
        given = {"output": output, "progress": progress, "team": team, **options.given(**words)}
        made = api.survey(model, **given)
    if not team.leads:
        return
    record = {
        "model": made.model_name,
        "targets": len(made.curves),
        "scores": list(made.scores),
        "seconds": sum(made.facts["seconds"].values()),
        "notes": list(made.notes),
        "output": str(output),
    }
    terminal.show(record, print_survey)


def print_survey(record: dict[str, Any]) -> None:
    """Print what was measured, and what to do with it."""
    from spectrim.cli.progress import format_seconds
    from spectrim.cli.render import print_facts

    print_facts(
        {
            **record,
            "scores": ", ".join(record["scores"]),
            "seconds": None,
            "time": format_seconds(record["seconds"]),
            "notes": record["notes"],
            "next": f"spectrim plan {record['output']} --keep 0.6",
        }
    )

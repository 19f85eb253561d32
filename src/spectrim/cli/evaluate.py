"""`spectrim evaluate`: perplexity, agreement, zero-shot tasks and bytes of one or more models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.study import as_length, print_tasks
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.errors import InputError
from spectrim.run.reading_words import EvaluateWords


@takes(
    *("text", "against", "adapter", "window_length", "max_tokens", "batch", "bos"),
    *("tasks", "limit", "task_folders", "device", "dtype", "trust_remote_code"),
    of=EvaluateWords,
)
def evaluate(
    terminal: Terminal,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model names or folders, dense or compressed."),
    ],
    **words: Any,
) -> None:
    """Measure perplexity, parameters and bytes of each MODEL.

    With --against, the dense model comes first, and differences from it are paired.
    """
    words["window_length"], tasks = as_length(words["window_length"]), words["tasks"]
    with terminal.working():
        from spectrim.api.evaluating import evaluate_models

        results = evaluate_models(models, **options.given(**words))
    terminal.show(results, print_results)
    for result in results:
        if tasks is not None and not result["zero_shot"]["tasks"]:
            reason = next(iter(result["zero_shot"]["skipped"].values()))
            raise InputError(f"no task of {tasks} could be measured on {result['model']}: {reason}")


def print_results(results: list[dict[str, Any]]) -> None:
    """Print what every model scores, text by text and then task by task."""
    from spectrim.cli.results import print_evaluations

    print_evaluations(results)
    print_tasks(results)

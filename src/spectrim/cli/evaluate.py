"""`spectrim evaluate`: perplexity, agreement, zero-shot tasks and bytes of one or more models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.words import takes
from spectrim.errors import InputError

__all__ = ["evaluate"]


@takes("text", "max_tokens", "device", "dtype", "trust_remote_code")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model names or folders, dense or compressed."),
    ],
    against: options.Against = None,
    window_length: Annotated[
        str | None,
        typer.Option(
            "--window-length",
            metavar="TOKENS|max",
            help="Tokens per window, or max for the model's longest; default 2048.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", help="Windows per forward pass.")
    ] = None,
    bos: options.EvaluationBos = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="A,B,...",
            help="Zero-shot tasks of lm-eval by name, literature (seven tasks), or offline.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Questions per task.")
    ] = None,
    task_folders: Annotated[
        list[Path] | None,
        typer.Option("--task-folder", metavar="DIR", help="lm-eval task files of your own."),
    ] = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    **words: Any,
) -> None:
    """Measure perplexity, parameters and bytes of each MODEL.

    With --against, the dense model comes first, and differences from it are paired.
    """
    from spectrim.cli.session import session

    chosen = options.given(
        against=against,
        window_length=as_length(window_length),
        batch=batch,
        bos=bos,
        tasks=tasks,
        limit=limit,
        task_folders=task_folders or None,
        **words,
    )
    with session(verbose=verbose, quiet=quiet or as_json):
        from spectrim.measure.evaluating import evaluate_models

        results = evaluate_models(models, **chosen)
    from spectrim.cli.render import print_json
    from spectrim.cli.results import print_evaluations
    from spectrim.cli.study import print_tasks

    if as_json:
        print_json(results)
    else:
        print_evaluations(results)
        print_tasks(results)
    for result in results:
        if tasks is not None and not result["zero_shot"]["tasks"]:
            reason = next(iter(result["zero_shot"]["skipped"].values()))
            raise InputError(f"no task of {tasks} could be measured on {result['model']}: {reason}")


def as_length(words: str | None) -> int | str | None:
    """`2048` as a number, `max` as it is."""
    if words is None or words == "max":
        return words
    if not words.isdigit():
        raise InputError(f"--window-length is {words!r}; expected a number of tokens or max")
    return int(words)

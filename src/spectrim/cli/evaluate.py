"""`spectrim evaluate`: perplexity with its protocol, parameters and bytes of one or more models."""

from __future__ import annotations

from typing import Annotated

import typer

from spectrim.cli import options

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model names or folders, dense or compressed."),
    ],
    against: options.Against = None,
    text: options.Text = None,
    window_length: options.WindowLength = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="Score at most N tokens of the text."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="A,B,...", help="Zero-shot tasks of lm-eval."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", help="Windows per forward pass.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure perplexity, parameters and bytes of each MODEL."""
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet or as_json):
        from spectrim import api

        chosen = options.given(
            against=against,
            text=text,
            window_length=window_length,
            max_tokens=max_tokens,
            tasks=None if tasks is None else [task.strip() for task in tasks.split(",")],
            batch=batch,
            device=device,
            dtype=dtype,
        )
        results = {model: api.evaluate(model, **chosen) for model in models}
    from spectrim.cli.render import print_json
    from spectrim.cli.results import print_evaluations

    if as_json:
        print_json(results if len(models) > 1 else results[models[0]])
    else:
        print_evaluations(results)

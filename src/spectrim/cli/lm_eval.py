"""`spectrim lm-eval`: lm-eval's own command line, able to load compressed folders."""

from __future__ import annotations

import sys

import typer

from spectrim.errors import MissingExtraError


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with compressed folders and our offline tasks known to it.

    Everything after the name goes to lm-eval as it is, for example: spectrim lm-eval run --model
    hf --model_args pretrained=OUT --tasks spectrim_pairs
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval", "spectrim lm-eval") from error
    from spectrim.evaluate.zero_shot import TASK_FOLDER

    arguments = list(context.args)
    starts = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("--"))
    if starts and not {"-h", "--help", "--include_path"} & set(arguments):
        arguments += ["--include_path", str(TASK_FOLDER)]
    before = sys.argv
    # lm-eval reads the arguments of the process.
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before

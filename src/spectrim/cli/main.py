"""The `spectrim` program: registers the commands and turns errors into exit codes.

Exit codes: 0 done, 2 refused (one line `error: ...` on stderr), 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from spectrim import __version__
from spectrim.cli import (
    adapter,
    bench,
    calibration_study,
    compare,
    compress,
    curve,
    demo,
    depth,
    elastic,
    evaluate,
    export,
    heal,
    inspect,
    lm_eval,
    plan,
    recipes,
    report,
    resize,
    slider,
    survey,
)
from spectrim.cli.crew import check_alone
from spectrim.cli.words import GroupedCommand
from spectrim.errors import SpectrimError
from spectrim.shortage import ran_short

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

# Plain help: drawing it with rich would import rich for every `--help`, twice the time, and its
# boxes do not fit narrow terminals.
app = typer.Typer(
    name="spectrim",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"spectrim {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Make large language models smaller by low-rank (SVD) compression."""
    check_alone(context.invoked_subcommand)


for command in (
    compress.compress,
    evaluate.evaluate,
    bench.bench,
    inspect.inspect,
    export.export,
    adapter.adapter,
    heal.heal,
    survey.survey,
    plan.plan,
    elastic.elastic,
    resize.resize,
    curve.curve,
    compare.compare,
    depth.distortion,
    depth.layer_errors,
    calibration_study.calibration_study,
    report.report,
    slider.slider,
):
    app.command(cls=GroupedCommand)(command)
app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(lm_eval.lm_eval)
app.command(cls=GroupedCommand)(demo.demo)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command line and exit the process."""
    try:
        app()
    except SpectrimError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        short = ran_short(error)
        if short is None:
            raise
        print(f"error: {one_line(short)}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        # Only before a command has begun its work; `session` reports everything later.
        print("interrupted: nothing was left behind", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def one_line(error: BaseException) -> str:
    """The message without line breaks, so that scripts can read it as one record."""
    return " ".join(str(error).split())

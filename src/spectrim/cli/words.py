"""Options made from their declarations in `run/words.py`, and help with a heading per group."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from spectrim.cli.options import check_keep, check_size
from spectrim.run.reading_words import StudyWords
from spectrim.run.word import CALIBRATION, MAKE, MEASURE, OUTPUT, WHERE, Word, declared
from spectrim.run.words import WORDS

__all__ = ["CALIBRATING", "MEASURING", "GroupedCommand", "takes"]

CALIBRATING = ("text", "windows", "window_length", "seed")
"""Words for the calibration of every run of a study."""

MEASURING = (
    "evaluation_text",
    "evaluation_length",
    "max_tokens",
    "device",
    "dtype",
    "trust_remote_code",
)
"""Words for what a study measures on."""

CHECKED_AT_ONCE = {"keep": check_keep, "size": check_size}
"""Words that are answered before anything heavy is imported."""

GROUPS = ("Arguments", MAKE, CALIBRATION, MEASURE, WHERE, OUTPUT, "Options")

Command = TypeVar("Command", bound=Callable[..., Any])


def takes(*names: str, of: type | None = None) -> Callable[[Command], Command]:
    """A command whose `**words` are the options of these names; those not given are None.

    Args:
        names: of `WORDS` and `StudyWords`.
        of: the function whose words they are, where it has a meaning of its own for them.
    """
    words = WORDS | declared(StudyWords) if of is None else declared(of)

    def wrap(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [_parameter(words[name]) for name in names]

        @wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **{**{p.name: p.default for p in added}, **kwargs})

        told: Any = command
        told.__signature__ = signature.replace(parameters=[*own, *added])
        told.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return told

    return wrap


def _parameter(word: Word) -> inspect.Parameter:
    flag = word.flag or f"--{word.name.replace('_', '-')}"
    is_switch = word.kind is bool and "/" not in flag
    option = typer.Option(
        flag,
        callback=CHECKED_AT_ONCE.get(word.name),
        metavar=word.metavar,
        help=word.help,
        rich_help_panel=word.group,
        show_default=False,
    )
    return inspect.Parameter(
        word.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_switch else None,
        annotation=Annotated[word.kind if is_switch else word.kind | None, option],
    )


class GroupedCommand(TyperCommand):
    """Help in groups, plain: no boxes, which do not fit narrow terminals."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write what belongs together under one heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            group = getattr(parameter, "rich_help_panel", None) or kind
            groups.setdefault(group, []).append(record)
        for group in sorted(groups, key=GROUPS.index):
            with formatter.section(group):
                # Names in a narrow column, so that the words beside them keep theirs.
                formatter.write_dl(groups[group], col_max=24)

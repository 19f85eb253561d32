"""Options made from their declarations in `run/words.py`, and help with a heading per group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from spectrim.cli.options import check_keep, check_size
from spectrim.cli.terminal import OPTIONS, Terminal
from spectrim.run.reading_words import StudyWords
from spectrim.run.word import CALIBRATION, MAKE, MEASURE, OUTPUT, WHERE, Word, declared
from spectrim.run.words import WORDS

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


def takes(
    *names: str, of: type | None = None, told: Collection[str] = tuple(OPTIONS)
) -> Callable[[Command], Command]:
    """A command whose `**words` are the options of these names; those not given are None.

    Its first argument is the terminal, which gets the options in `told`.

    Args:
        names: of `WORDS` and `StudyWords`.
        of: the function whose words they are, where it has a meaning of its own for them.
        told: of `terminal.OPTIONS`.
    """
    words = WORDS | declared(StudyWords) | ({} if of is None else declared(of))

    def wrap(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
        added = [_parameter(words[name]) for name in names]
        spoken = [_option(name, OPTIONS[name], False) for name in told]

        @wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            terminal = Terminal(**{name: kwargs.pop(name) for name in told if name in kwargs})
            return function(terminal, *args, **{**{p.name: p.default for p in added}, **kwargs})

        shown: Any = command
        shown.__signature__ = signature.replace(parameters=[*own, *spoken, *added])
        shown.__annotations__ = {p.name: p.annotation for p in (*own, *spoken, *added)}
        return shown

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
    kind = word.kind if is_switch else word.kind | None
    return _option(word.name, Annotated[kind, option], False if is_switch else None)


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


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

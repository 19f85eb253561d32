"""One word of the interface, and functions whose keywords are such words.

Imports nothing heavy: `--help` reads it.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args

from spectrim.run.options import RunOptions

MAKE = "What to make"
CALIBRATION = "Calibration"
MEASURE = "Measuring"
WHERE = "Where and how"
OUTPUT = "Output"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Word:
    """One word.

    Attributes:
        help: what it does, one sentence.
        metavar: what stands for its value in `--help`; None for its kind.
        group: heading in `--help`.
        field: its place in the recipe, by dotted name; None for what is no part of one.
        flag: on the command line, where it is not `--name`.
        default: in Python, where it is not that of `RunOptions`.
        kind: what the command line reads, where it is not the first type that Python takes.
        name: in Python; with dashes on the command line.
    """

    help: str
    metavar: str | None = None
    group: str = WHERE
    field: str | None = None
    flag: str | None = None
    default: Any = None
    kind: Any = None
    name: str = ""


def declared(kind: type) -> dict[str, Word]:
    """The words of a function, by name, with their defaults."""
    ways = {one.name: one.default for one in fields(RunOptions) if one.default is not MISSING}
    found = {}
    for name, said in kind.__annotations__.items():
        word, default = said.__metadata__[0], ways.get(name, said.__metadata__[0].default)
        read = word.kind or _read(said.__origin__)
        found[name] = replace(word, name=name, default=default, kind=read)
    return found


def _read(said: Any) -> Any:
    """A number or a switch where Python takes that first, else what the user wrote."""
    first = next(iter(get_args(said)), said)
    return first if first in (bool, int, float) else str


def among(words: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The words of this kind among those of a call."""
    return {name: words[name] for name in kind.__annotations__ if name in words}


def takes(kind: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose keywords are these words; it gets all of them, with their defaults.

    Its signature and its text show every word to `help()`.

    Args:
        kind: one of the classes above.
    """
    words = declared(kind)

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def told(*args: P.args, **given: P.kwargs) -> R:
            unknown = next((name for name in given if name not in own | words.keys()), None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown, words, 1, 0.0)[0]
                raise TypeError(
                    f"{function.__name__}() takes no {unknown!r}; the nearest word is {near!r}"
                )
            every = {name: word.default for name, word in words.items()} | given
            whole: Any = function
            return whole(*args, **every)

        signature = inspect.signature(function)
        before = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = {p.name for p in before}
        shown: Any = told
        shown.__signature__ = signature.replace(
            parameters=[*before, *(_shown(word, kind) for word in words.values())]
        )
        lines = (f"        {name}: {word.help}" for name, word in words.items())
        shown.__doc__ = "\n".join([f"{function.__doc__}\n    Words:", *lines, "    "])
        return told

    return wrap


def _shown(word: Word, kind: type) -> inspect.Parameter:
    said = kind.__annotations__[word.name].__origin__
    return inspect.Parameter(
        word.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=word.default,
        annotation=getattr(said, "__forward_arg__", said),
    )

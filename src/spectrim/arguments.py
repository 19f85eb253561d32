"""What a caller may pass, looked at before any work: kinds of values, and their ranges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from spectrim.errors import BudgetError, InputError


def check_whole(*, least: int = 1, most: int | None = None, **values: Any) -> None:
    """Refuse what is no whole number of at least `least`; None stands for a default.

    Raises:
        InputError: names the argument and its value.
    """
    for name, value in values.items():
        if value is None:
            continue
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or int(value) < least or (most is not None and int(value) > most):
            upto = "" if most is None else f" and at most {most}"
            raise InputError(
                f"{name} is {_shown(value)}; expected a whole number of at least {least}{upto}"
            )


def check_fraction(**values: Any) -> None:
    """Refuse what is no number in (0, 1]; None stands for a default.

    Raises:
        BudgetError: names the argument and its value.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) <= 1:
            raise BudgetError(
                f"{name} is {_shown(value)}; it is a number in (0, 1], for example 0.6"
            )


def check_path(**values: Any) -> None:
    """Refuse what is no path; None stands for a default.

    Raises:
        InputError: names the argument and its value.
    """
    for name, value in values.items():
        words = str(value) if isinstance(value, str | os.PathLike) else ""
        if value is not None and (not words or "\0" in words):
            raise InputError(f"{name} is {_shown(value)}; expected a path")


def refuse_unused(reason: str, given: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect; those that are None or empty were not given.

    Raises:
        InputError: names the first of them, and the reason.
    """
    for name, value in given.items():
        if value is not None and value is not False and value != ():
            raise InputError(f"{name} would have no effect: {reason}; leave it out")


def _shown(value: Any) -> str:
    """A value as users wrote it; its kind as well, unless it is a number."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return str(value)[:80]
    shown = str(value)[:80]
    return f"{repr(shown) if isinstance(value, str) else shown} ({type(value).__name__})"

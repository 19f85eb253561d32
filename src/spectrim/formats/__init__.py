"""Number formats of stored matrices, by the word that plans and `config.json` use for them.

A format is one file with one class; a new one is a further row here. Budget, files, layers, plans
and benchmarks ask the row. Nothing here imports torch before numbers are at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from spectrim.errors import ArtifactError
from spectrim.formats.affine4 import Affine4
from spectrim.formats.float8 import Float8
from spectrim.formats.grouped import Grouped
from spectrim.formats.int8 import Int8
from spectrim.formats.native import Native
from spectrim.formats.number_format import NumberFormat

__all__ = [
    "FORMATS",
    "JOINT",
    "NumberFormat",
    "format_of",
    "formats_of",
    "known_patterns",
    "known_weights",
]

JOINT = "+"
"""Between the formats of a layer whose parts have different ones: `int4+int8`."""

FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {
        row.name: row
        for row in (
            Native(),
            Int8(),
            Affine4(),
            Float8(),
            *(Grouped(bits, group) for bits in (8, 4, 3, 2) for group in (32, 64, 128)),
        )
    }
)
"""Word -> format."""


def format_of(name: str) -> NumberFormat:
    """The number format of that name.

    Raises:
        ArtifactError: an unknown name; lists the known ones.
    """
    found = FORMATS.get(name)
    if found is None:
        raise ArtifactError(
            f"unknown weights {name!r}; this version of spectrim knows {', '.join(FORMATS)}"
        )
    return found


def formats_of(weights: str, parts: int) -> tuple[NumberFormat, ...]:
    """The formats of a layer's parts in their order; the last one named serves all that follow.

    Raises:
        ArtifactError: an unknown format, or more formats than parts.
    """
    names = weights.split(JOINT)
    if len(names) > parts:
        raise ArtifactError(f"weights {weights!r} name {len(names)} formats for {parts} parts")
    return tuple(format_of(names[min(i, len(names) - 1)]) for i in range(parts))


def known_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns themselves, if each fits a format.

    Raises:
        ValueError: one fits none; quotes what is known.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in FORMATS):
            known = ", ".join(map(repr, FORMATS))
            raise ValueError(f"{pattern!r} fits no format; known are {known}")
    return patterns


def known_weights(weights: str) -> str:
    """The formats themselves, if all of them are known; `auto` leaves the choice to the plan.

    Raises:
        ValueError: one is not; quotes what is known.
    """
    for name in weights.split(JOINT) if weights != "auto" else ():
        if name not in FORMATS:
            known = ", ".join(map(repr, [*FORMATS, "auto"]))
            raise ValueError(f"{name!r} is unknown; expected one of {known}")
    return weights

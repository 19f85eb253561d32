"""Sizes as people write and read them: `3.5GB`, `13.8 MB`."""

from __future__ import annotations

import re
from fractions import Fraction

from spectrim.errors import BudgetError

UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS[_letter] = UNITS[f"{_letter}B"] = 1000**_power
    UNITS[f"{_letter}IB"] = 1024**_power

SHOWN = ("B", "kB", "MB", "GB", "TB")


def parse_size(text: str | int) -> int:
    """Bytes of a size like `3.5GB` (decimal), `3.5GiB` (binary), `800 MB` or `123456`.

    Raises:
        BudgetError: if it is no positive size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str):
        raise BudgetError(f"size is a {type(text).__name__}; expected bytes, or text like 3.5GB")
    match = re.fullmatch(r"\s*(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise BudgetError(f"{text!r} is no size: expected a number with a unit, e.g. 3.5GB or 3GiB")
    size = int(Fraction(match.group(1).replace("_", "")) * unit)
    if size < 1:
        raise BudgetError(f"size {text!r} is less than one byte")
    return size


def format_bytes(count: float) -> str:
    """Decimal units as on a disk's label: `13.8 MB`; the same units that `--size` reads."""
    value, power = float(count), 0
    while abs(value) >= 1000 and power < len(SHOWN) - 1:
        value, power = value / 1000, power + 1
    # Three digits, without the exponent that %g would choose for 999.9.
    decimals = 0 if power == 0 or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{decimals}f} {SHOWN[power]}"

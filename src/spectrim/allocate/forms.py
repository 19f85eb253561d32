"""The forms that a target can be stored in: a storage kind and the number formats of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from spectrim.allocate.curve import Curve, as_numpy
from spectrim.allocate.plan import PlanEntry
from spectrim.formats import FORMATS, JOINT, format_of
from spectrim.layers.layout import LAYERS, layout_of

AUTO = "auto"
"""In place of a number format: the plan chooses one for every target."""

RESIDUAL = "residual"
"""The storage of a rounded matrix and a low-rank correction."""

EVERY = ("*",)
"""Patterns of formats that leave none out."""

_FACTOR_BITS = (4, 3)

_BASES = ("int4-g64", "int4-g128", "int3-g128", "int2-g128")
"""Of residuals with factors of 8 bits. Each costs a survey as much; `int3-g64` and `int2-g64`
change the least loss by less than a hundredth on the bundled model."""

_NEVER = ("int4", "int8-g32", "int8-g64")
"""Formats that no plan takes: zero points, and small groups of eight bits, cost more than they
save."""

_NAMED = ("fp8",)
"""Formats that a plan takes only where a pattern other than `*` fits them: int8 has the same bytes
and mostly less error, so this is for engines that want them."""


@dataclass(frozen=True)
class Form:
    """One way to store a matrix.

    Attributes:
        storage: the kind.
        weights: formats of its parts.
    """

    storage: str
    weights: str = "native"

    @property
    def key(self) -> str:
        """Both in one word."""
        return f"{self.storage} {self.weights}"

    @property
    def low_rank(self) -> bool:
        """Whether it has a rank."""
        return layout_of(self.storage, self.weights).low_rank

    @property
    def whole(self) -> bool:
        """Whether nothing is cut, so that rounding is all that it loses."""
        return layout_of(self.storage, self.weights).whole

    def ranks(self, most: int) -> tuple[int, ...]:
        """The few ranks that it is offered with, up to `most`; empty where it may have any."""
        return tuple(k for k in layout_of(self.storage).ranks if k <= most)

    @property
    def base(self) -> str:
        """The format of its first part."""
        return self.weights.split(JOINT)[0]

    @property
    def coded(self) -> bool:
        """Whether anything in it is rounded to codes."""
        return layout_of(self.storage, self.weights).coded

    @property
    def rounding_share(self) -> float:
        """Loss of rounding to nearest, as a share of losing the whole target."""
        return max(format_of(name).rounding_share for name in self.weights.split(JOINT))


def low_rank_forms(storage: str, weights: str, formats: Sequence[str] = EVERY) -> tuple[Form, ...]:
    """The forms of cut matrices that a recipe's storage choice allows; none with `dense`.

    Factors of few columns fill large groups badly, and `up` has as many columns as components: its
    groups may be smaller than those of `down`.
    """
    kinds = [name for name, row in LAYERS.items() if row.automatic]
    kinds = kinds if storage == AUTO else [storage]
    if any(LAYERS[kind].whole for kind in kinds):
        return ()
    if weights != AUTO:
        return tuple(Form(kind, weights) for kind in kinds)
    native = tuple(Form(kind) for kind in kinds)
    pairs = [
        f"int{bits}-g{up}{JOINT}int{bits}-g{down}"
        for bits in _FACTOR_BITS
        for up, down in ((32, 32), (32, 64), (32, 128), (64, 64), (64, 128))
    ]
    every = (Form("factored", pair) for pair in ("int8", "fp8", *pairs))
    return (*native, *(form for form in every if _allowed(form, formats)))


def whole_forms(storage: str, weights: str, formats: Sequence[str] = EVERY) -> tuple[Form, ...]:
    """The forms of targets that are not cut that a recipe's storage choice allows.

    Residuals are among them where the plan chooses the formats, but with `dense`, and where they
    are asked for: with a base of its own, beside the base alone.
    """
    if weights != AUTO:
        residual = [Form(RESIDUAL, weights)] if storage == RESIDUAL else []
        return (*dense_forms(residual[0].base if residual else weights), *residual)
    bases = () if storage == "dense" else _BASES
    residuals = (Form(RESIDUAL, f"{base}{JOINT}int8") for base in bases)
    return (*dense_forms(AUTO, formats), *(form for form in residuals if _allowed(form, formats)))


def dense_forms(weights: str, formats: Sequence[str] = EVERY) -> tuple[Form, ...]:
    """The forms of whole matrices: their own numbers, and codes where asked for."""
    native = Form("dense")
    if weights == AUTO:
        every = [name for name, row in FORMATS.items() if row.coded and name not in _NEVER]
        forms = (Form("dense", name) for name in every)
        return (native, *(form for form in forms if _allowed(form, formats)))
    return (native,) if weights == "native" else (native, Form("dense", weights))


def _allowed(form: Form, formats: Sequence[str]) -> bool:
    """Whether the formats of all parts fit one of the patterns."""
    fits = {
        name: {pattern for pattern in formats if fnmatchcase(name, pattern)}
        for name in form.weights.split(JOINT)
    }
    return all(found - {*EVERY} if name in _NAMED else found for name, found in fits.items())


def rounded_loss(curve: Curve, entry: PlanEntry) -> float:
    """What rounding adds to a target as planned, nats; 0 where no survey judged the form."""
    known = (curve.rounding or {}).get(Form(entry.storage, entry.weights).key)
    if known is None:
        return 0.0
    values = as_numpy(known)
    return float(values[(entry.rank or 0) % values.size])

"""Every objective by name: what it gathers, and its function and options, read from its file.

A new objective is one file with one function of the same name, and one row here; a program adds a
row for its own. Nothing here imports torch before something is decomposed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from spectrim.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from spectrim.decompose.decomposition import Decomposition
    from spectrim.moments.moments import Moments, OutputMoments

Input = Literal["C", "shifted", "cross", "absolute"]
"""Sums over the inputs of a target: fields of `Moments`."""

Output = Literal["G", "fisher"]
"""Sums over gradients of its output: what fields of `OutputMoments` are made from."""


@dataclass(frozen=True)
class Objective:
    """One objective, in the file of its name.

    Attributes:
        name: of the file and of the function in it,
            `f(W, moments, output, *, name, rank, **options) -> Decomposition`.
        unit: what one unit of energy is.
        inputs: statistics of the target's inputs that it gathers.
        outputs: statistics of gradients of the target's output that it gathers.
        module: the file, where it is none of this room.
    """

    name: str
    unit: str
    inputs: frozenset[Input] = frozenset()
    outputs: frozenset[Output] = frozenset()
    module: str = ""

    @classmethod
    def that_gathers(cls, *gathers: Input | Output, name: str, unit: str, module: str = ""):
        """One with these statistics of inputs and outputs."""
        given: Any = frozenset(gathers)
        return cls(name, unit, given - {"G", "fisher"}, given & {"G", "fisher"}, module)

    @property
    def needs(self) -> frozenset[str]:
        """Everything that it gathers; nothing for one of the weights alone."""
        return frozenset(self.inputs | self.outputs)

    @property
    def original(self) -> frozenset[Input]:
        """Statistics of the inputs in the untouched network, for which one stream is enough."""
        return self.inputs - {"shifted", "cross"}

    @cached_property
    def function(self) -> Callable[..., Decomposition]:
        """The function, imported when it is first wanted."""
        module = self.module or f"spectrim.decompose.{self.name}"
        return getattr(import_module(module), self.name)

    @cached_property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """Its own keyword options, by name."""
        every = inspect.signature(self.function, eval_str=True).parameters.values()
        own = {p.name: p for p in every if p.kind is p.KEYWORD_ONLY}
        return {name: p for name, p in own.items() if name not in ("name", "rank")}

    def accepted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a larger set of options that this objective takes."""
        return {key: value for key, value in options.items() if key in self.options}


_OUTPUT = "squared output, summed over tokens"
_NATS = "nats per token"

OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective.that_gathers(name="plain", unit="squared weight"),
        Objective.that_gathers(
            "fisher", name="fisher", unit="squared loss change, summed over windows"
        ),
        Objective.that_gathers("absolute", name="activation", unit="squared scaled weight"),
        Objective.that_gathers("C", name="whitened", unit=_OUTPUT),
        Objective.that_gathers("shifted", name="shifted", unit=_OUTPUT),
        Objective.that_gathers("C", "shifted", "cross", name="anchored", unit=_OUTPUT),
        Objective.that_gathers("C", "G", name="kfac", unit=_NATS),
        Objective.that_gathers("C", "shifted", "cross", "G", name="anchored_kfac", unit=_NATS),
    )
}
"""The objectives of `Recipe.decompose.objective`."""


def known_objective(name: str) -> str:
    """The name itself, if there is such an objective.

    Raises:
        ValueError: there is none; quotes what is known.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"{name!r} is unknown; expected one of {', '.join(map(repr, OBJECTIVES))}")
    return name


def decompose(
    objective: str,
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    **options: Any,
) -> Decomposition:
    """Ordered components of one target for an objective given by name.

    Args:
        objective: a key of `OBJECTIVES`.
        W: weight, (out, in), any floating dtype.
        moments: input moments of the target's group.
        output: gradient moments of the target.
        name: the target's module path, for messages.
        rank: components to hold, min(out, in) by default.
        options: of the objective, see its function.

    Returns:
        fp64 factors; the caller casts once.

    Raises:
        RecipeError: an unknown objective or option.
        InputError: a needed statistic was not collected.
        NonFiniteError, NotPositiveDefiniteError, NumericalError: named after the target.
    """
    spec = OBJECTIVES.get(objective)
    if spec is None:
        raise RecipeError(f"objective {objective!r} is unknown; choose one of {list(OBJECTIVES)}")
    unknown = sorted(set(options) - set(spec.options))
    if unknown:
        raise RecipeError(
            f"objective {objective!r} takes no option {unknown}; it takes {sorted(spec.options)}"
        )
    return spec.function(W, moments, output, name=name, rank=rank, **options)

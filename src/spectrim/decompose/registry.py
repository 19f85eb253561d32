"""Every objective by name: its function, the statistics it needs, the options it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from spectrim.decompose.activation import activation
from spectrim.decompose.anchored import anchored
from spectrim.decompose.anchored_kfac import anchored_kfac
from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.fisher import fisher
from spectrim.decompose.kfac import kfac
from spectrim.decompose.plain import plain
from spectrim.decompose.shifted import shifted
from spectrim.decompose.statistics import Statistic
from spectrim.decompose.whitened import whitened
from spectrim.errors import RecipeError
from spectrim.moments.moments import Moments, OutputMoments

__all__ = ["OBJECTIVES", "ObjectiveSpec", "decompose"]


@dataclass(frozen=True)
class ObjectiveSpec:
    """One objective.

    Attributes:
        function: `f(W, moments, output, *, name, rank, **options) -> Decomposition`.
        needs: statistics that must have been collected.
        options: names of the keyword options that `function` takes.
        unit: what one unit of energy is.
    """

    function: Callable[..., Decomposition]
    needs: frozenset[Statistic]
    options: frozenset[str]
    unit: str

    def accepted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a larger set of options that this objective takes."""
        return {key: value for key, value in options.items() if key in self.options}


def _spec(
    function: Callable[..., Decomposition],
    needs: tuple[Statistic, ...],
    options: tuple[str, ...],
    unit: str,
) -> ObjectiveSpec:
    return ObjectiveSpec(function, frozenset(needs), frozenset(options), unit)


_OUTPUT = "squared output, summed over tokens"

OBJECTIVES: Mapping[str, ObjectiveSpec] = MappingProxyType(
    {
        "plain": _spec(plain, (), (), "squared weight"),
        "fisher": _spec(fisher, ("fisher",), ("side",), "squared loss change, summed over windows"),
        "activation": _spec(activation, ("absolute",), ("alpha",), "squared scaled weight"),
        "whitened": _spec(whitened, ("C",), ("shrink_in",), _OUTPUT),
        "shifted": _spec(shifted, ("shifted",), ("shrink_in",), _OUTPUT),
        "anchored": _spec(
            anchored, ("C", "shifted", "cross"), ("blend", "ridge", "shrink_in"), _OUTPUT
        ),
        "anchored_kfac": _spec(
            anchored_kfac,
            ("C", "shifted", "cross", "G"),
            ("blend", "ridge", "shrink_in", "shrink_out"),
            "nats per token",
        ),
        "kfac": _spec(kfac, ("C", "G"), ("shrink_in", "shrink_out"), "nats per token"),
    }
)
"""The objectives of `Recipe.decompose.objective`."""


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
    unknown = sorted(set(options) - spec.options)
    if unknown:
        raise RecipeError(
            f"objective {objective!r} takes no option {unknown}; it takes {sorted(spec.options)}"
        )
    return spec.function(W, moments, output, name=name, rank=rank, **options)

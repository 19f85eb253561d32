"""All allocation rules by name: what each reads of a survey; its options are its function's.

A new rule is one file with one function, and one row here; a program adds a row for its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spectrim.allocate.curve import Curve
from spectrim.allocate.knapsack import knapsack
from spectrim.allocate.ladder import Limits
from spectrim.allocate.loss_ratio import loss_ratio
from spectrim.allocate.plan import Plan
from spectrim.allocate.sensitivity import TABLE, sensitivity
from spectrim.allocate.uniform import uniform
from spectrim.allocate.zero_sum import zero_sum
from spectrim.errors import InputError

NATS = "nats per token"
"""Unit of predicted losses that can be held against measured ones."""


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        function: called as `rule(curves, keep=..., limits=..., **its own options)`.
        surveys: whether it needs spectra; shapes are enough otherwise.
        reads: of a recipe's score, the one that a survey must hold for the rule.
        minimises: whether the losses of its plans are those that this score predicts.
        weighs_forms: whether it chooses among storages and number formats by their losses.
    """

    function: Callable[..., Plan]
    surveys: bool = True
    reads: Callable[[str], str] = lambda score: "energy"
    minimises: bool = False
    weighs_forms: bool = False

    @cached_property
    def options(self) -> frozenset[str]:
        """Names of its own options: words of recipes, and what a survey knows."""
        return frozenset(inspect.signature(self.function).parameters) - {"curves", "keep", "limits"}

    def scores(self, score: str) -> frozenset[str]:
        """What a survey must hold besides spectra; `table` for measured sensitivities."""
        return frozenset({self.reads(score)}) - {"energy"}

    def unit(self, score: str) -> str:
        """What the predicted losses of its plans are counted in."""
        in_nats = self.minimises and self.scores(score)
        return NATS if in_nats else "relative squared errors, summed over targets"


RULES: dict[str, Rule] = {
    "uniform": Rule(uniform, surveys=False),
    "loss_ratio": Rule(loss_ratio),
    "sensitivity": Rule(sensitivity, reads=lambda score: TABLE if score == "measured" else score),
    "zero_sum": Rule(zero_sum, reads=lambda score: "first_order", minimises=True),
    "knapsack": Rule(knapsack, reads=lambda score: score, minimises=True, weighs_forms=True),
}
"""The rules of `Recipe.allocate.rule`."""


def known_rule(name: str) -> str:
    """The name itself, if there is such a rule.

    Raises:
        ValueError: there is none; quotes what is known.
    """
    if name not in RULES:
        raise ValueError(f"{name!r} is unknown; expected one of {', '.join(map(repr, RULES))}")
    return name


def allocate(
    curves: Sequence[Curve],
    rule: str = "uniform",
    *,
    keep: float,
    limits: Limits | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan by the rule of that name.

    Args:
        curves: the targets, in execution order; `uniform` needs no spectra.
        rule: a key of `RULES`.
        keep: fraction of the dense target bytes to keep.
        limits: storage, number format, least rank, rank multiple, dtype bytes.
        options: those of a recipe and what a survey knows; the rule takes its own.

    Raises:
        InputError: for an unknown rule, or curves without what the rule needs.
        BudgetError: for a keep that the limits do not allow.
    """
    if rule not in RULES:
        raise InputError(f"unknown allocation rule {rule!r}, expected one of {', '.join(RULES)}")
    chosen = RULES[rule]
    own = {name: value for name, value in (options or {}).items() if name in chosen.options}
    return chosen.function(curves, keep=keep, limits=limits, **own)

"""All allocation rules by name, and one call that gives each the options it understands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from spectrim.allocate.curve import Curve, Score
from spectrim.allocate.knapsack import knapsack
from spectrim.allocate.ladder import Limits
from spectrim.allocate.loss_ratio import loss_ratio
from spectrim.allocate.plan import Plan
from spectrim.allocate.sensitivity import Table, predicted_table, sensitivity
from spectrim.allocate.uniform import uniform
from spectrim.allocate.zero_sum import zero_sum
from spectrim.errors import InputError

__all__ = ["RULES", "allocate"]

RULES: dict[str, Callable[..., Plan]] = {
    "uniform": uniform,
    "loss_ratio": loss_ratio,
    "sensitivity": sensitivity,
    "zero_sum": zero_sum,
    "knapsack": knapsack,
}
"""Every rule is called as `rule(curves, keep=..., limits=..., **its own options)`."""


def allocate(
    curves: Sequence[Curve],
    rule: str = "uniform",
    *,
    keep: float,
    limits: Limits | None = None,
    score: Score = "energy",
    fill: bool = True,
    faithful: bool = False,
    table: Table | None = None,
    scale: Mapping[str, float] | None = None,
) -> Plan:
    """A plan by the rule of that name, from the options that recipes have.

    Args:
        curves: the targets, in execution order; `uniform` needs no spectra.
        rule: a key of `RULES`.
        keep: fraction of the dense target bytes to keep.
        limits: storage, number format, least rank, rank multiple, dtype bytes.
        score: for knapsack, and for sensitivity without a table.
        fill: for uniform, loss_ratio and sensitivity.
        faithful: for zero_sum.
        scale: for knapsack, what predicted losses of cutting and rounding are worth.
        table: measured sensitivities; without them they are predicted from the score.

    Raises:
        InputError: for an unknown rule, or curves without what the rule needs.
        BudgetError: for a keep that the limits do not allow.
    """
    if rule in ("uniform", "loss_ratio"):
        return RULES[rule](curves, keep=keep, limits=limits, fill=fill)
    if rule == "zero_sum":
        return zero_sum(curves, keep=keep, limits=limits, faithful=faithful)
    if rule == "knapsack":
        return knapsack(curves, keep=keep, limits=limits, score=score, scale=scale)
    if rule == "sensitivity":
        found = table or predicted_table(curves, score=score, limits=limits)
        return sensitivity(curves, keep=keep, table=found, limits=limits, fill=fill)
    raise InputError(f"unknown allocation rule {rule!r}, expected one of {', '.join(RULES)}")

"""One order of all components, and every size by cutting it: what an elastic artifact holds.

Components are removed by ascending importance. Cutting the order anywhere gives a plan, so that a
byte budget is answered by one search in the cumulative sizes: always within the budget, within
one component of it, and smaller plans are contained in larger ones.

A target above break-even is dense, whatever part of it the order has removed; removals save
nothing there. `repair` uses that: it spends what is left over on the components removed last and
then on making targets dense again. Repaired plans are no longer strictly nested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spectrim.allocate.curve import Curve, as_numpy, curve_values, loss_by_rank
from spectrim.allocate.ladder import (
    Ladder,
    Limits,
    budget_for,
    ladders_for,
    plan_from_levels,
    spend,
)
from spectrim.allocate.plan import Plan
from spectrim.allocate.removal import occurrences
from spectrim.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from spectrim.allocate.curve import Values


@dataclass(frozen=True, eq=False)
class GlobalOrder:
    """All components of a model in the order of their removal.

    Attributes:
        target: index of the curve, int32 (N,), first removed first.
        position: index of the component in its decomposition, int32 (N,).
    """

    target: np.ndarray
    position: np.ndarray

    def components(self, target: int) -> np.ndarray:
        """A target's components, most important first: the order to store its factors in."""
        return self.position[self.target == target][::-1]


def global_order(
    curves: Sequence[Curve],
    *,
    importance: Sequence[Sequence[Values]] | None = None,
    spectral: bool = True,
) -> GlobalOrder:
    """Sort all components of the model by importance.

    Args:
        curves: the targets; without `importance`, with their energies.
        importance: per target one or more keys of shape (r,), the first decides, later ones
            break ties (for ACIP: the step at which the gate died, its value, its gradient).
            Default: energy over the target's total.
        spectral: a component is never removed before the ones behind it in its target, as
            factors that are cut as slices need.

    Returns:
        A total order: remaining ties are removed by target name, tail first.

    Raises:
        InputError: if keys and curves do not fit together.
        NonFiniteError: if a key is NaN (infinite keys are allowed: never removed first).
    """
    if importance is None:
        importance = [(_relative_energy(c),) for c in curves]
    if len(importance) != len(curves) or len({len(keys) for keys in importance}) != 1:
        raise InputError(
            f"importance has {len(importance)} targets for {len(curves)}, or a different number "
            f"of keys per target"
        )
    by_name = sorted(range(len(curves)), key=lambda i: curves[i].name)
    columns = [
        np.concatenate([_key(curves[i], importance[i][j])[::-1] for i in by_name])
        for j in range(len(importance[0]))
    ]
    ranks = np.array([curves[i].rank for i in by_name])
    target = np.repeat(np.array(by_name), ranks)
    position = np.concatenate([np.arange(r - 1, -1, -1) for r in ranks])
    order = np.lexsort(columns[::-1])
    if spectral:
        place = np.empty_like(order)
        place[order] = np.arange(order.size)
        # Largest place so far, target by target: offsets keep the targets apart.
        offset = np.repeat(np.arange(ranks.size), ranks) * order.size
        reached = np.maximum.accumulate(place + offset) - offset
        order = np.argsort(reached, kind="stable")
    return GlobalOrder(target[order].astype(np.int32), position[order].astype(np.int32))


def ranks_at(
    order: GlobalOrder,
    curves: Sequence[Curve],
    *,
    keep: float,
    limits: Limits | None = None,
    repair: bool = False,
) -> Plan:
    """The plan that a cut of the order gives for a budget.

    Args:
        order: of all components of these curves.
        curves: the targets in the order that `order.target` counts them.
        keep: fraction of the dense target bytes to keep.
        limits: what the plan may contain; components below a least rank stay.
        repair: spend what is left over, at the price of strict nesting.

    Returns:
        The plan. A kept rank k means the k components that the order removes last.

    Raises:
        BudgetError: if the keep is below what the limits allow.
    """
    ladders = ladders_for(curves, limits or Limits())
    budget = budget_for(ladders, keep)
    targets, removed = _removals(order, ladders)
    by_drops = [x.bytes[x.levels_by_rank()][::-1] for x in ladders]
    offset = np.cumsum([0, *(b.size for b in by_drops[:-1])])
    flat = np.concatenate(by_drops)
    start = offset[targets] + removed
    sizes = sum(x.dense_bytes for x in ladders) + np.cumsum(flat[start + 1] - flat[start])
    sizes = np.append(sum(x.dense_bytes for x in ladders), sizes)
    cut = int(np.searchsorted(-sizes, -budget))
    counts = np.bincount(targets[:cut], minlength=len(ladders))
    levels = np.array(
        [x.levels_by_rank()[x.curve.rank - n] for x, n in zip(ladders, counts, strict=True)]
    )
    if repair:
        levels = spend(ladders, levels, budget, list(dict.fromkeys(targets[:cut][::-1].tolist())))
    known = all(c.energy is not None for c in curves)
    losses = [loss_by_rank(c, "energy") for c in curves] if known else None
    return plan_from_levels(ladders, levels, keep=keep, rule="order", losses=losses)


def _removals(order: GlobalOrder, ladders: Sequence[Ladder]) -> tuple[np.ndarray, np.ndarray]:
    """Targets of the allowed removals, and how many removals each target had before."""
    total = sum(x.curve.rank for x in ladders)
    if order.target.size != total:
        raise InputError(f"the order has {order.target.size} components, the curves {total}")
    targets = order.target.astype(np.int64)
    removed = occurrences(targets)
    most = np.array([x.curve.rank - int(x.ranks[0]) if x.top else 0 for x in ladders])
    allowed = removed < most[targets]
    return targets[allowed], removed[allowed]


def _relative_energy(curve: Curve) -> np.ndarray:
    """Share of the target's total that each component removes."""
    energy = curve_values(curve, "energy")
    return energy / curve.total if curve.total > 0 else energy


def _key(curve: Curve, key: Values) -> np.ndarray:
    """One importance key as fp64 numpy, checked."""
    if key.shape != (curve.rank,):
        raise InputError(
            f"{curve.name}: importance has shape {tuple(key.shape)}, expected ({curve.rank},)"
        )
    values = as_numpy(key)
    if np.isnan(values).any():
        raise NonFiniteError(f"{curve.name}: an importance is NaN")
    return values

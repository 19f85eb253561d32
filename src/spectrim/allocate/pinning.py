"""Targets with a size of their own, and the budget that this leaves to the others.

The whole budget is that of the recipe's keep over all targets. Pinned ones take what they were
given, and the rule shares the rest among the others as if they were all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np

from spectrim.allocate.budget import budget_bytes
from spectrim.allocate.curve import Curve, Score, loss_by_rank
from spectrim.allocate.ladder import Ladder, Limits, ladders_for
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.errors import BudgetError


class OwnChoice(Protocol):
    """What some targets get whatever the rule says; that of a recipe has these fields."""

    @property
    def match(self) -> str:
        """Pattern on target names."""
        ...

    @property
    def keep(self) -> float | None:
        """A size of their own."""
        ...

    @property
    def rank(self) -> int | None:
        """A rank of their own."""
        ...

    @property
    def storage(self) -> str | None:
        """A storage of their own."""
        ...


def own_storages(curves: Sequence[Curve], own: Sequence[OwnChoice]) -> list[Curve]:
    """The curves, with the storage that their own choice asks for."""
    found = []
    for curve in curves:
        choice = _choice(curve.name, own)
        storage = None if choice is None else choice.storage
        found.append(curve if storage is None else replace(curve, storage=storage))
    return found


def plan_around(
    curves: Sequence[Curve],
    own: Sequence[OwnChoice],
    *,
    keep: float,
    limits: Limits,
    score: Score | None,
    rule: Callable[[Sequence[Curve], float], Plan],
) -> Plan:
    """The rule's plan for the targets without a size of their own, beside those with one.

    Args:
        curves: all targets, in execution order, each with its own storage.
        own: choices; those with a keep or a rank pin their targets.
        keep: of all targets together.
        limits: what the plan may contain.
        score: that losses of pinned targets are predicted by; None predicts none.
        rule: makes a plan of some targets at a keep.

    Raises:
        BudgetError: a size that a target cannot have, or pinned ones that leave too little.
    """
    pins = {c.name: p for c in curves if (p := _choice(c.name, own)) is not None and _pins(p)}
    if not pins:
        return rule(curves, keep)
    ladders = {ladder.curve.name: ladder for ladder in ladders_for(curves, limits)}
    entries = {name: _pinned(ladders[name], pin, score) for name, pin in pins.items()}
    rest = [curve for curve in curves if curve.name not in pins]
    taken = sum(entry.bytes for entry in entries.values())
    budget = budget_bytes(keep, sum(ladder.dense_bytes for ladder in ladders.values()))
    if taken > budget:
        raise BudgetError(
            f"the {len(pins)} targets with a size of their own take {taken} bytes, and keep "
            f"{keep:g} allows {budget} for all {len(curves)}; give them less, or a larger keep"
        )
    notes = [f"{len(pins)} targets have a size of their own, {taken / budget:.1%} of the budget"]
    name = "own"
    if rest:
        dense = sum(ladders[curve.name].dense_bytes for curve in rest)
        made = rule(rest, min(1.0, (budget - taken) / dense))
        entries |= {entry.name: entry for entry in made.entries}
        notes = [*made.notes, *notes]
        name = made.rule
    return Plan(tuple(entries[curve.name] for curve in curves), keep, name, tuple(notes))


def _choice(name: str, own: Sequence[OwnChoice]) -> OwnChoice | None:
    return next((choice for choice in own if fnmatchcase(name, choice.match)), None)


def _pins(choice: OwnChoice) -> bool:
    return choice.keep is not None or choice.rank is not None


def _pinned(ladder: Ladder, pin: OwnChoice, score: Score | None) -> PlanEntry:
    level = _level(ladder, pin)
    rank = None if level == ladder.top else int(ladder.ranks[level])
    loss = None
    if score is not None:
        loss = 0.0 if rank is None else float(loss_by_rank(ladder.curve, score)[rank])
    form = ladder.form(level)
    return PlanEntry(
        name=ladder.curve.name,
        rank=rank,
        storage=form.storage,
        bytes=int(ladder.bytes[level]),
        dense_bytes=ladder.dense_bytes,
        weights=form.weights,
        loss=loss,
    )


def _level(ladder: Ladder, pin: OwnChoice) -> int:
    """Where on its ladder a pinned target stands."""
    name = ladder.curve.name
    if pin.keep is not None:
        level = ladder.level_within(budget_bytes(pin.keep, ladder.dense_bytes))
        if level < 0:
            least = int(ladder.bytes[0]) / ladder.dense_bytes
            raise BudgetError(
                f"{name} cannot keep {pin.keep:g} (own choice {pin.match!r}); its smallest size "
                f"is {least:.4f}"
            )
        return level
    found = np.flatnonzero(ladder.ranks == pin.rank)
    if not found.size:
        possible = "only dense" if not ladder.ranks.size else f"up to {ladder.ranks[-1]} or dense"
        raise BudgetError(
            f"{name} cannot have rank {pin.rank} (own choice {pin.match!r}); possible is "
            f"{possible}, in multiples of {ladder.limits.multiple}: a larger rank would take as "
            "many bytes as the dense layer, for which keep: 1 stands"
        )
    return int(found[0])

"""One rank for the same matrix of all experts of a block.

Engines with grouped products, and stacked factors, want experts of one shape. Targets of one
projection and block are joined to one curve that stands for all of them: its bytes and its losses
are their sums, so every rule plans it like a target, and the plan is spelt out again after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from spectrim.allocate.curve import Curve, as_numpy, curve_values
from spectrim.allocate.plan import Plan
from spectrim.errors import InputError


def equal_in_blocks(curves: Sequence[Curve], make: Callable[[list[Curve]], Plan]) -> Plan:
    """The plan of a rule in which experts of a block have equal ranks.

    Args:
        curves: of all targets; those of one block and projection are the same matrix of experts.
        make: the rule.

    Raises:
        InputError: see `make`; or a matrix whose experts differ in shape.
    """
    families: dict[tuple[int, str, str | None], list[Curve]] = {}
    for curve in curves:
        key = curve.block, curve.projection, curve.storage
        families.setdefault(key, []).append(curve)
    joined = {members[0].name: members for members in families.values()}
    plan = make([_joined(members) for members in families.values()])
    entries = {}
    for entry in plan.entries:
        members = joined[entry.name]
        for curve in members:
            entries[curve.name] = replace(
                entry,
                name=curve.name,
                bytes=entry.bytes // len(members),
                dense_bytes=entry.dense_bytes // len(members),
                loss=None if entry.loss is None else entry.loss / len(members),
            )
    return replace(plan, entries=tuple(entries[curve.name] for curve in curves))


def _joined(members: list[Curve]) -> Curve:
    first = members[0]
    if len(members) == 1:
        return first
    if any(c.shape != first.shape or c.rank != first.rank for c in members):
        raise InputError(
            f"the experts of {first.projection} in block {first.block} differ in shape, and equal "
            "ranks are for experts of one shape"
        )

    def summed(what: str) -> np.ndarray | None:
        if getattr(first, what) is None:
            return None
        return np.sum([curve_values(c, what) for c in members], axis=0)  # type: ignore[arg-type]

    exact = [c.lossless for c in members if c.lossless is not None]
    references = [c.reference for c in members if c.reference is not None]
    whole = len(references) == len(members) and len({rank for rank, _ in references}) == 1
    return replace(
        first,
        copies=len(members),
        energy=summed("energy"),
        score=summed("score"),
        loss=summed("loss"),
        rounding=_rounding(members),
        total=sum(c.total for c in members),
        irreducible=sum(c.irreducible for c in members),
        lossless=max(exact) if len(exact) == len(members) else None,
        reference=(references[0][0], sum(kl for _, kl in references)) if whole else None,
    )


def _rounding(members: Sequence[Curve]) -> dict[str, np.ndarray] | None:
    """Losses of rounding, added up; a target with nothing at stake has none."""
    known = [c.rounding for c in members if c.rounding is not None]
    if not known:
        return None
    forms = sorted({form for rounding in known for form in rounding})
    return {form: np.sum([as_numpy(r[form]) for r in known if form in r], axis=0) for form in forms}

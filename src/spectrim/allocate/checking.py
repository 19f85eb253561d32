"""A plan that somebody brought, held against the model that is to carry it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from spectrim.allocate.budget import Shape, components, layer_bytes
from spectrim.allocate.curve import shape_curves
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.errors import BudgetError

if TYPE_CHECKING:
    from spectrim.model.anatomy import Anatomy


def check_plan(
    plan: Plan, anatomy: Anatomy, *, dtype_bytes: int = 2, held: Mapping[str, int] | None = None
) -> Plan:
    """A plan that somebody brought, as this model can carry it out; its bytes are recounted.

    Args:
        plan: from a file, which people edit, or from a survey.
        anatomy: of the model.
        dtype_bytes: of the checkpoint's dtype.
        held: components per target, where they come from a survey.

    Raises:
        BudgetError: it names other targets, or ranks that a target or the survey does not have;
            names the target.
    """
    planned, found = {e.name for e in plan.entries}, {t.name for t in anatomy.targets}
    if planned != found:
        odd = sorted(planned ^ found)
        raise BudgetError(
            f"the plan is for another model: {len(odd)} targets do not match, {odd[0]!r} first"
        )
    shapes = {c.name: c.shape for c in shape_curves(anatomy)}
    entries = tuple(
        _settled(entry, shapes[entry.name], dtype_bytes, (held or {}).get(entry.name))
        for entry in plan.entries
    )
    changed = [a.name for a, b in zip(plan.entries, entries, strict=True) if a.bytes != b.bytes]
    if not changed:
        return plan
    note = (
        f"the plan's bytes were recounted: {len(changed)} of {len(entries)} targets take others "
        f"than it says, {changed[0]} first"
    )
    return replace(plan, entries=entries, notes=(*plan.notes, note))


def _settled(entry: PlanEntry, shape: Shape, dtype_bytes: int, held: int | None) -> PlanEntry:
    """One target's entry with its true bytes."""
    name, rank, sizes = entry.name, entry.rank, f"{shape.out_features} x {shape.in_features}"
    dense = layer_bytes(shape, rank=None, storage="dense", dtype_bytes=dtype_bytes)
    if entry.dense_bytes != dense:
        raise BudgetError(
            f"the plan is for another model, dtype or shape: it counts {entry.dense_bytes} bytes "
            f"for the dense {name}, which is {sizes} and takes {dense}"
        )
    if rank is not None and not 1 <= rank <= components(shape):
        raise BudgetError(
            f"the plan gives {name} rank {rank}; its matrix is {sizes} and has ranks from 1 to "
            f"{components(shape)}"
        )
    if held is not None and (entry.components or 0) > held:
        raise BudgetError(
            f"the plan gives {name} rank {rank}; the survey holds {held} components of it"
        )
    counted = layer_bytes(
        shape, rank=rank, storage=entry.storage, weights=entry.weights, dtype_bytes=dtype_bytes
    )
    return replace(entry, bytes=counted)

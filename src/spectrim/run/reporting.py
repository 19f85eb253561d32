"""The report of a run: what was done to every target, what it cost, and under which protocol."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from spectrim import __version__
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.recipe import Recipe
from spectrim.run.job import RunLog

_LIBRARIES = ("torch", "transformers", "safetensors", "pydantic")


# Metadata of a package is a file that is read and parsed.
_version = cache(version)


def environment() -> dict[str, Any]:
    """Versions and hardware that a number depends on."""
    return {
        "spectrim": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process in bytes, None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None  # on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


@dataclass(frozen=True)
class Original:
    """What a report says of the model before.

    Attributes:
        name: what the user called it.
        shapes: target -> (out, in).
        other_bytes: of everything that is not a target, as stored.
        left_alone: what is not compressed, and why.
        outside: how much lies outside the budget, as `Outside.record` counts it; None if unknown.
        protected_bytes: of linear layers that the user protects; they are no targets.
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    other_bytes: int
    left_alone: dict[str, str]
    outside: dict[str, Any] | None
    protected_bytes: int = 0


def build_report(
    original: Original,
    recipe: Recipe,
    plan: Plan,
    log: RunLog,
    *,
    calibration: dict[str, Any] | None,
    measured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything as JSON-ready values.

    Args:
        original: the model before.
        recipe: resolved.
        plan: as carried out.
        log: of the run.
        calibration: record of the windows, None for a data-free recipe.
        measured: perplexity before and after, where it was measured.
    """
    dense = sum(e.dense_bytes for e in plan.entries)
    kept = sum(e.bytes for e in plan.entries)
    other, protected = original.other_bytes, original.protected_bytes
    shapes = original.shapes
    targets = [_target(e, shapes[e.name], log.targets.get(e.name, {})) for e in plan.entries]
    return {
        "format_version": 1,
        "model": original.name,
        "recipe": {"name": recipe.name, "hash": recipe.hash()},
        "keep": {
            "asked": plan.keep,
            "achieved": plan.achieved_keep,
            "with_protected": (kept + protected) / (dense + protected),
            "target_bytes": {"dense": dense, "stored": kept},
            "model_bytes": {"dense": dense + other, "stored": kept + other},
            "whole_model": (kept + other) / (dense + other),
        },
        "rule": plan.rule,
        "predicted_loss": plan.predicted_loss,
        "predicted_loss_unit": plan.unit,
        "measured": measured,
        "targets": targets,
        "blocks": log.blocks,
        "network": log.network,
        "left_alone": original.left_alone,
        "outside_budget": original.outside,
        "calibration": calibration,
        "seconds": log.stages,
        "peak_memory_bytes": peak_memory_bytes(),
        "notes": [*plan.notes, *log.notes],
        "environment": environment(),
    }


def _target(entry: PlanEntry, shape: tuple[int, int], facts: dict[str, Any]) -> dict[str, Any]:
    """One target as it was carried out, and what the run noted of it."""
    return {
        "name": entry.name,
        "shape": list(shape),
        "rank": entry.rank,
        "storage": entry.storage,
        "weights": entry.weights,
        "bytes": entry.bytes,
        "dense_bytes": entry.dense_bytes,
        "kept": entry.kept,
        "predicted_loss": entry.loss,
        **facts,
    }

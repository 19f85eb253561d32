"""Allocation: spectra and a byte budget in, a rank or "dense" for every target out."""

from spectrim.allocate.budget import (
    ModelBytes,
    Shape,
    break_even,
    components,
    keep_for_size,
    layer_bytes,
    parse_size,
    rank_for,
)
from spectrim.allocate.curve import SCORES, Curve, Score, loss_by_rank
from spectrim.allocate.ladder import Limits, smallest_keep
from spectrim.allocate.plan import Plan, PlanEntry, Storage, Weights
from spectrim.allocate.uniform import uniform

__all__ = [
    "SCORES",
    "Curve",
    "Limits",
    "ModelBytes",
    "Plan",
    "PlanEntry",
    "Score",
    "Shape",
    "Storage",
    "Weights",
    "break_even",
    "components",
    "keep_for_size",
    "layer_bytes",
    "loss_by_rank",
    "parse_size",
    "rank_for",
    "smallest_keep",
    "uniform",
]

"""Allocation: spectra and a byte budget in, a rank or "dense" for every target out."""

from spectrim.allocate.budget import (
    Shape,
    break_even,
    components,
    keep_for_size,
    layer_bytes,
    rank_for,
)
from spectrim.allocate.curve import SCORES, Curve, Score, loss_by_rank
from spectrim.allocate.knapsack import knapsack
from spectrim.allocate.ladder import Limits, smallest_keep
from spectrim.allocate.loss_ratio import loss_ratio
from spectrim.allocate.order import GlobalOrder, global_order, ranks_at
from spectrim.allocate.plan import Plan, PlanEntry, Storage, Weights
from spectrim.allocate.rules import RULES, allocate
from spectrim.allocate.sensitivity import predicted_table, sensitivity
from spectrim.allocate.uniform import uniform
from spectrim.allocate.zero_sum import select, zero_sum
from spectrim.sizes import parse_size

__all__ = [
    "RULES",
    "SCORES",
    "Curve",
    "GlobalOrder",
    "Limits",
    "Plan",
    "PlanEntry",
    "Score",
    "Shape",
    "Storage",
    "Weights",
    "allocate",
    "break_even",
    "components",
    "global_order",
    "keep_for_size",
    "knapsack",
    "layer_bytes",
    "loss_by_rank",
    "loss_ratio",
    "parse_size",
    "predicted_table",
    "rank_for",
    "ranks_at",
    "select",
    "sensitivity",
    "smallest_keep",
    "uniform",
    "zero_sum",
]

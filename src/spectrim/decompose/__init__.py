"""Ordered components `W ≈ B A`: per objective one decomposition, the best answer at each rank."""

from spectrim.decompose.balance import balanced
from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.registry import OBJECTIVES, ObjectiveSpec, decompose

__all__ = ["OBJECTIVES", "Decomposition", "ObjectiveSpec", "balanced", "decompose"]

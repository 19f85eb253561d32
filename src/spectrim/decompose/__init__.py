"""Ordered components `W ≈ B A`: per objective one decomposition, the best answer at each rank."""

from spectrim.decompose.registry import OBJECTIVES, Objective, decompose, known_objective

__all__ = ["OBJECTIVES", "Objective", "decompose", "known_objective"]

"""How fast a training moves: learning rates from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def warmup_cosine(step: int, total: int, *, warmup: float, final: float) -> float:
    """Factor of the peak learning rate at `step` (0-based) of `total`.

    Linear from zero over the first `warmup` share of the steps, then a cosine from 1 to `final`.
    """
    ramp = max(1, round(warmup * total))
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, total - ramp)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_pace(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Give every group of an optimizer its learning rate for the next step."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate

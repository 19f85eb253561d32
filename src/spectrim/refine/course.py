"""Which windows a training learns from, and which it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectrim.distributed.pool import Pool
from spectrim.distributed.team import Team
from spectrim.errors import InputError


@dataclass(frozen=True)
class Course:
    """What is trained on and judged by.

    Attributes:
        train: indices of the windows to train on.
        held: indices of the windows that choose the step; empty keeps the last one.
        tokens: per window, for the throughput.
        on_judged: called with (step, held-out loss) after every judgement.
        pool: of the windows, where several processes share them.
    """

    train: Tensor
    held: Tensor
    tokens: int
    on_judged: Callable[[int, float], None] = lambda step, loss: None
    pool: Pool = field(default_factory=lambda: Pool(Team(), 0, ()))


def hold_out(windows: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices `(train, held_out)`; the held-out windows are spread evenly over all.

    Raises:
        InputError: a share was asked for and there are fewer than two windows to split.
    """
    everything = torch.arange(windows)
    if share == 0:
        return everything, everything[:0]
    count = max(1, round(windows * share))
    if windows - count < 1:
        raise InputError(
            f"{windows} calibration window(s) cannot be split into a training and a held-out "
            "part; use more windows, or held_out: 0 to train without selection"
        )
    mask = torch.ones(windows, dtype=torch.bool)
    mask[(torch.arange(count) * windows) // count] = False
    return everything[mask], everything[~mask]

"""The rate-distortion line that a training draws while it runs.

Losses of single batches scatter more than sizes differ, so the line holds a running mean for every
tenth of keep that the training has been through: `0.9: 3.81, 0.8: 3.84, 0.7: 3.89`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

MEMORY = 0.9
"""Decay of the running means, once there are enough losses."""


@dataclass
class RateLine:
    """Mean loss by size.

    Attributes:
        means: tenth of keep -> (losses seen, running mean).
    """

    means: dict[int, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def over(cls, history: Iterable[Iterable[float]]) -> RateLine:
        """The line of an earlier part of the training: (step, loss, keep) each."""
        line = cls()
        for _, loss, keep in history:
            line.see(keep, loss)
        return line

    def see(self, keep: float, loss: float) -> None:
        """Take in the loss of a batch at a size."""
        seen, mean = self.means.get(round(10 * keep), (0, 0.0))
        share = max(1 - MEMORY, 1 / (seen + 1))
        self.means[round(10 * keep)] = (seen + 1, mean + share * (loss - mean))

    def text(self) -> str:
        """From the largest size to the smallest."""
        tenths = sorted(self.means, reverse=True)
        return ", ".join(f"{tenth / 10:.1f}: {self.means[tenth][1]:.3g}" for tenth in tenths)

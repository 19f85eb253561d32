"""What every training of gates shares: windows by step, losses, accumulation, divergence.

Which windows a step sees is a function of the seed and the step, so that a resumed run continues
with the same ones. Losses are fp32 means over tokens: cross-entropy of the next token, or the KL
divergence from the original model's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spectrim.errors import NonFiniteError
from spectrim.model.losses import divergence, next_token
from spectrim.model.tail import Tail

Report = Callable[[str, int, int, str], None]
"""Told (stage, step, total, note)."""

CEILING = 2.0
"""A loss this many times that of guessing, or of the untrained model, counts as divergence."""

Objective = Literal["cross_entropy", "kl"]


def mixed_seed(seed: int, *more: int) -> int:
    """One seed that depends on all the numbers."""
    for number in more:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed


def seeded(seed: int, *more: int) -> torch.Generator:
    """A generator whose stream depends on all the numbers."""
    return torch.Generator().manual_seed(mixed_seed(seed, *more))


@dataclass
class Lessons:
    """The model being trained, and what it is trained on.

    Attributes:
        ids: windows, (N, T), int64, on the CPU.
        student: ids (B, T) -> hidden states behind the gated model's last block, (B, T, d).
        teacher: window indices (B,) -> those of the original model; None without one.
        tail: what both do behind their last block.
        device: where to train.
        batch: windows per forward pass.
        accumulate: forward passes per step.
        seed: of the order of the windows.
        autocast: bf16 products with fp32 masters.
    """

    ids: Tensor
    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None
    tail: Tail
    device: torch.device
    batch: int
    accumulate: int = 1
    seed: int = 0
    autocast: bool = False
    _epoch: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)

    def rows(self, step: int) -> list[Tensor]:
        """Window indices of a step's forward passes; every epoch sees each window once."""
        batch = min(self.batch, len(self.ids))
        per_epoch = len(self.ids) // batch
        first = step * self.accumulate
        chosen = []
        for turn in range(first, first + self.accumulate):
            epoch, place = divmod(turn, per_epoch)
            if self._epoch is None or self._epoch[0] != epoch:
                order = torch.randperm(len(self.ids), generator=seeded(self.seed, epoch))
                self._epoch = (epoch, order)
            chosen.append(self._epoch[1][place * batch : (place + 1) * batch])
        return chosen

    def loss(self, rows: Tensor, objective: Objective) -> Tensor:
        """Mean loss per token of some windows, fp32."""
        ids = self.ids[rows].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.student(ids)
            if objective == "cross_entropy":
                return self.tail.total(hidden[:, :-1], next_token(ids)) / ids[:, 1:].numel()
            if self.teacher is None:
                raise ValueError("the objective kl needs a teacher")
            with torch.no_grad():
                expected = divergence(self.tail, self.teacher(rows))
            return self.tail.total(hidden, expected) / ids.numel()

    def backward(self, step: int, objective: Objective, prepare: Callable[[int], None]) -> float:
        """Add the gradients of one step.

        Args:
            step: says which windows.
            objective: of the step.
            prepare: called before every forward pass with its number in the step; binds gates
                with a fresh graph, draws dropout.

        Returns:
            The mean loss, NaN or infinite if a pass was; gradients are then incomplete.
        """
        total = 0.0
        for turn, rows in enumerate(self.rows(step)):
            prepare(turn)
            with torch.enable_grad():
                loss = self.loss(rows, objective) / self.accumulate
            total += float(loss.detach())
            if not math.isfinite(total):
                return total
            loss.backward()
        return total

    def guard(self, first_loss: float, hint: str) -> Guard:
        """What to hold later losses against; `hint` says what to lower."""
        guess = math.log(int(self.ids.max()) + 1)
        known = first_loss if math.isfinite(first_loss) else guess
        return Guard(CEILING * max(known, guess), hint)

    @torch.no_grad()
    def measure(self, rows: Tensor, objective: Objective) -> float:
        """Mean loss of the model as it stands, over some windows."""
        parts = rows.split(self.batch)
        return sum(float(self.loss(part, objective)) * len(part) for part in parts) / len(rows)


@dataclass
class Guard:
    """Stops a training that has gone wrong.

    Attributes:
        ceiling: a loss above it is worse than knowing nothing.
        hint: what to lower.
    """

    ceiling: float
    hint: str

    def check(self, loss: float, step: int, kept: str) -> None:
        """Raise if the loss of a step (1-based) cannot be trusted.

        Raises:
            NonFiniteError: says what to lower and where the last good state is.
        """
        if not math.isfinite(loss) or loss > self.ceiling:
            raise NonFiniteError(
                f"training diverged at step {step}: the loss is {loss:.4g}, expected at most "
                f"{self.ceiling:.4g}; lower {self.hint}. {kept}"
            )

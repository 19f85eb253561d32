"""What SoCo's training is told and what it carries along; scores and gates follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from spectrim.learn.gates import GateFunction, gate_values
from spectrim.learn.pruning import Gated

FADE_SHARE = 0.7
"""Share of the last phase over which components below the threshold fade."""


@dataclass(frozen=True)
class SocoSettings:
    """How to learn scores; the recipe section `SocoLearning` explains the fields."""

    keep: float
    parts: Literal["all", "selection", "allocation"]
    score: GateFunction
    threshold: float
    learning_rate: float
    deviation_learning_rate: float
    clip: float
    warmup_steps: int
    explore_steps: int
    oscillate_steps: int
    sparsify_steps: int
    pressure_growth: float
    pressure_cap: float
    sparsity: float
    hysteresis: float
    settled: float
    undecided: float
    dead_after: int
    hard: bool
    sensitivity_steps: int


@dataclass
class SocoState:
    """Everything that changes while scores are learned.

    Attributes:
        theta: raw scores, (N,).
        mean_score: running mean of the scores, (N,).
        mean_square: running mean of squared gradients, (N,).
        crossings: how often each score crossed the threshold, int32 (N,).
        below: consecutive steps below it while sparsifying, int32 (N,).
        dead: held at zero, boolean (N,).
        snapshot: the kept set when pressure was last switched on, boolean (N,).
        used: components that take part in the products, boolean (N,).
        sensitivity: F, mean squared gate gradient in the original model, (N,).
        phase: `explore`, `oscillate`, `sparsify` or `done`.
        phase_step: steps done in this phase.
        step: steps done in all.
        pressure: λ, relative to the median of √(w / F).
        pressing: whether the pressure is on.
        first_loss: of the first step with a gradient.
        history: (step, loss, kept share).
    """

    theta: nn.Parameter
    mean_score: Tensor
    mean_square: Tensor
    crossings: Tensor
    below: Tensor
    dead: Tensor
    snapshot: Tensor
    used: Tensor
    sensitivity: Tensor
    phase: str = "explore"
    phase_step: int = 0
    step: int = 0
    pressure: float = 0.5
    pressing: bool = True
    history: list[list[float]] = field(default_factory=list)

    _TENSORS: ClassVar = (
        "mean_score",
        "mean_square",
        "crossings",
        "below",
        "dead",
        "snapshot",
        "used",
        "sensitivity",
    )
    _COUNTERS: ClassVar = ("phase", "phase_step", "step", "pressure", "pressing", "history")

    @classmethod
    def fresh(cls, gated: Gated, score: GateFunction) -> SocoState:
        """Every score at exactly one."""
        theta = gated.scores(score, scale=1.0, dtype=torch.float32)
        zero = torch.zeros_like(theta.detach())
        count = zero.to(torch.int32)
        return cls(
            theta=theta,
            mean_score=zero + 1,
            mean_square=zero.clone(),
            crossings=count,
            below=count.clone(),
            dead=zero > 0,
            snapshot=zero > 0,
            used=zero == 0,
            sensitivity=zero + 1,
        )

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"theta": self.theta, **{name: getattr(self, name) for name in self._TENSORS}}

    def counters(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in self._COUNTERS}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """The inverse of the two above."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        for name in self._COUNTERS:
            setattr(self, name, counters[name])

    def enter(self, phase: str) -> None:
        """Go to a phase."""
        self.phase, self.phase_step = phase, 0


def scores_of(state: SocoState, settings: SocoSettings) -> Tensor:
    """Scores (N,), zero where dead, without gradient."""
    scores = gate_values(state.theta.detach(), settings.score)
    return scores.masked_fill(state.dead, 0.0)


def gates_of(state: SocoState, settings: SocoSettings) -> Tensor:
    """The factors that the layers are bound to, differentiable in θ."""
    scores = gate_values(state.theta, settings.score)
    if settings.parts == "selection":
        # Forward exactly 0 or 1, backward the gradient of the score.
        hard = (scores.detach() > settings.threshold).to(scores.dtype)
        scores = hard + (scores - scores.detach())
    elif settings.hard or state.phase == "sparsify":
        low = scores.detach() <= settings.threshold
        faded = 1.0 if settings.hard else fading(state, settings)
        # Backward as if nothing faded, so that a score can still rise again.
        scores = scores - faded * (scores * low).detach()
    return scores.masked_fill(state.dead, 0.0)


def fading(state: SocoState, settings: SocoSettings) -> float:
    """How far components below the threshold have faded in the last phase, 0 to 1."""
    if state.phase != "sparsify":
        return float(state.phase == "done")
    return min(1.0, state.phase_step / (FADE_SHARE * settings.sparsify_steps))

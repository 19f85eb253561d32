"""What a backward pass leaves behind: output moments, input moments, scores of components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from spectrim.model.anatomy import Block
from spectrim.moments.folded import Folded
from spectrim.moments.moments import Moments, OutputMoments

ComponentsOf = Callable[[str], tuple[Tensor, Tensor] | None]
"""Target name -> up (out, r) and down (r, in), or None where there is nothing to score."""


@dataclass
class ComponentScores:
    """First-order loss change per component of one target, in nats of the mean loss per token.

    Attributes:
        first: `ΔL_i = -⟨∂L/∂W, B_i A_i⟩` over all windows, shape (r,).
        halves: the same over the even and the odd windows, shape (2, r): sign stability.
        squares: mean over windows of the squared per-window change, shape (r,): Fisher weight.
        tails: mean over tokens of what a token loses to second order, levelled off, when the
            components from one on are dropped together, nats, (r,); None if not asked for.
    """

    first: Tensor
    halves: Tensor
    squares: Tensor
    tails: Tensor | None = None

    @property
    def sign_stability(self) -> float:
        """Share of components whose sign agrees between the halves."""
        return float((self.halves[0].sign() == self.halves[1].sign()).double().mean())


@dataclass
class GradientPass:
    """What a gradient pass leaves behind, of all targets or of one block's.

    Attributes:
        outputs: by target.
        inputs: by a group's first target.
        scores: by target, where there were factors to score.
        loss: summed next-token cross-entropy of all windows, nats.
        tokens: predicted tokens behind it.
    """

    outputs: Folded[OutputMoments]
    inputs: Folded[Moments]
    scores: dict[str, ComponentScores] = field(default_factory=dict)
    loss: float = 0.0
    tokens: int = 0

    def of(self, block: Block) -> GradientPass:
        """What there is of one block."""
        names = [target.name for target in block.targets]
        scores = {name: self.scores[name] for name in names if name in self.scores}
        return replace(
            self, outputs=self.outputs.only(names), inputs=self.inputs.only(names), scores=scores
        )

"""What allocation knows of a target: its shape and what every further component is worth.

A `Curve` is turned into one predicted loss per rank, by the score that the user chose. With
`tail(k) = total - sum of the first k energies`:

    energy        tail(k) / total                      relative error of the layer
    first_order   max over j >= k of |sum_{i>=j} dL_i|  ZS-SVD's signed scores (arXiv 2602.02848)
    second_order  `loss` where given, else tail(k)      Fisher-weighted energies, loss units
    kfac          `loss` where given, else tail(k)      double-sided objective, nats
    measured      KL * tail(k) / tail(k0)               one measured KL at the reference rank k0

The maximum in `first_order` makes the curve fall with rank: a sum of signed estimates that
happens to cancel at some rank says nothing good about that rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from spectrim.allocate.budget import Shape, components
from spectrim.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    # Planning from a saved survey takes a second because nothing here imports torch.
    from torch import Tensor

    from spectrim.model.anatomy import Anatomy

    Values: TypeAlias = "Tensor | np.ndarray"

Score = Literal["energy", "first_order", "second_order", "measured", "kfac"]

SCORES: tuple[Score, ...] = ("energy", "first_order", "second_order", "measured", "kfac")
"""All scores by name."""


@dataclass(frozen=True, eq=False)
class Curve:
    """One target's spectrum and scores, the input of every allocation rule.

    Only the shape is needed by the uniform rule; the others say what they miss.

    Attributes:
        name: the target's module path, unique in the model.
        block: index of its block.
        projection: path inside the block; targets of one projection form a type.
        shape: of the weight.
        energy: error that each component removes, (r,), descending; None if unknown.
        total: the objective at rank 0, in the units of `energy`.
        irreducible: the objective at full rank.
        score: signed first-order change of the loss when a component is dropped, (r,), nats.
        loss: predicted loss at rank 0..r, (r + 1,), nats.
        reference: (rank, KL in nats) measured with only this target cut to that rank.
        lossless: rank of the weight itself where it is less than min(m, n): there nothing is lost
            and beyond it nothing is gained.
        rounding: storage form (`Form.key`) -> loss that rounding to it adds, nats: at rank 0..r,
            (r + 1,), or of the whole matrix, (1,).
        storage: low-rank storage of this target alone, in place of what the limits allow.
        copies: how many targets of this shape it stands for; losses and energies are their sums.
        group: which targets of its block read the same inputs; None if that is not known.
    """

    name: str
    block: int
    projection: str
    shape: Shape
    energy: Values | None = None
    total: float = 0.0
    irreducible: float = 0.0
    score: Values | None = None
    loss: Values | None = None
    reference: tuple[int, float] | None = None
    lossless: int | None = None
    rounding: Mapping[str, Values] | None = None
    storage: str | None = None
    copies: int = 1
    group: int | None = None

    @property
    def rank(self) -> int:
        """Number of components that can be kept: those decomposed, or min(m, n)."""
        return components(self.shape) if self.energy is None else self.energy.shape[0]


def tail_energy(curve: Curve) -> np.ndarray:
    """The objective at rank 0..r, fp64 of shape (r + 1,), non-increasing."""
    energy = curve_values(curve, "energy")
    kept = np.concatenate([[0.0], np.cumsum(energy)])
    return np.maximum(curve.total - kept, max(curve.irreducible, 0.0))


def loss_by_rank(curve: Curve, score: Score) -> np.ndarray:
    """Predicted loss at rank 0..r by one of the scores, fp64 of shape (r + 1,).

    Raises:
        InputError: if the curve lacks what the score needs.
        NonFiniteError: if what it needs is not finite.
    """
    losses = _predicted(curve, score)
    if curve.lossless is not None:
        losses = np.where(np.arange(losses.size) < curve.lossless, losses, 0.0)
    return losses


def _predicted(curve: Curve, score: Score) -> np.ndarray:
    """`loss_by_rank` of a matrix of full rank."""
    if score == "first_order":
        dropped = curve_values(curve, "score")
        sums = np.concatenate([np.abs(np.cumsum(dropped[::-1])), [0.0]])
        sums[:-1] = np.maximum.accumulate(sums[:-1])
        return np.concatenate([sums[:-1][::-1], [0.0]])
    if score in ("second_order", "kfac") and curve.loss is not None:
        return curve_values(curve, "loss")
    tail = tail_energy(curve)
    if score == "energy":
        return tail / curve.total if curve.total > 0 else np.zeros_like(tail)
    if score == "measured":
        return _rescaled(curve, tail)
    if score in ("second_order", "kfac"):
        return tail
    raise InputError(f"unknown score {score!r}, expected one of {', '.join(SCORES)}")


def _rescaled(curve: Curve, tail: np.ndarray) -> np.ndarray:
    """Tail energies scaled to the KL measured at the reference rank."""
    if curve.reference is None:
        raise InputError(f"{curve.name} has no measured KL: the score 'measured' needs a reference")
    rank, divergence = curve.reference
    if not 0 <= rank < tail.size:
        raise InputError(f"{curve.name}: reference rank {rank} is outside 0..{tail.size - 1}")
    return tail * (max(divergence, 0.0) / tail[rank]) if tail[rank] > 0 else np.zeros_like(tail)


def curve_values(curve: Curve, what: Literal["energy", "score", "loss"]) -> np.ndarray:
    """One of a curve's tensors as fp64 numpy, checked.

    Raises:
        InputError: if the curve has none, or one of another length than its rank asks for.
        NonFiniteError: if a value is not finite.
    """
    values: Values | None = getattr(curve, what)
    length = curve.rank + (what == "loss")
    if values is None:
        raise InputError(f"{curve.name} has no {what}, which this rule needs: survey it")
    if values.shape != (length,):
        raise InputError(
            f"{curve.name}: {what} has shape {tuple(values.shape)}, expected ({length},)"
        )
    array = as_numpy(values)
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{curve.name}: {what} has values that are not finite")
    return array


def as_numpy(values: Values) -> np.ndarray:
    """A tensor or an array as fp64 numpy."""
    if isinstance(values, np.ndarray):
        return values.astype(np.float64, copy=False)
    return values.detach().double().cpu().numpy()


def shape_curves(anatomy: Anatomy) -> list[Curve]:
    """What a rule that needs no spectra has to know of the targets."""
    return [
        Curve(
            t.name,
            t.block,
            t.matrix,
            Shape(t.out_features, t.in_features, t.bias),
            group=t.group,
        )
        for t in anatomy.targets
    ]

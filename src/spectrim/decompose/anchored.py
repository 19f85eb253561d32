"""Anchored: `min_{rank W' ≤ k} ‖W X − W' X'‖²_F`: original outputs from shifted inputs.

Objective 4 of AA-SVD (arXiv 2604.02119). With `C' = Σ x' x'ᵀ`, `D = Σ x x'ᵀ` the unconstrained
answer is the least-squares map `V = W D C'⁻¹`, and rank k is `U_k U_kᵀ V` with `U_k` the leading
eigenvectors of `V C' Vᵀ`. `blend` b moves the target to `W (b x + (1 − b) x')`: 1 is anchored, 0 is
shift-aware (SAES-SVD, arXiv 2602.03051, tunes it).

Differences from the authors' code: damped Cholesky solves instead of an explicit inverse, and a
ridge that pulls toward `W` instead of toward zero, so that directions which the shifted inputs
never visit keep the original weight and equal streams give back `W` exactly. How strong it is,
the data decide (`linalg.least_squares.evident_ridge`): without it the map fits the noise of the
calibration tokens, and a model cut from few of them is destroyed. What the map may move is in
proportion to the columns of `W`, and the moment in which `V` is cut is shrunk like that of the
other objectives, so that rescaled channels change nothing.

The objective that is reported is `‖W X − V X'‖² + ‖(V − W') X'‖²`, the second part in the shrunk
moment. Without ridge and shrinkage it is the exact one; with a ridge the parts leave out a product
that is as small as the ridge's step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import checked_rank, projected
from spectrim.decompose.statistics import statistic, tokens_of, weight
from spectrim.errors import InputError
from spectrim.linalg.least_squares import evident_ridge, least_squares_map
from spectrim.linalg.psd import finite, shrunk
from spectrim.linalg.truncated import ColumnSpace, column_space
from spectrim.moments.moments import Moments, OutputMoments


def anchored(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    blend: float = 1.0,
    ridge: float | None = None,
    shrink_in: float = 0.0,
    sizes: Tensor | None = None,
    root: Tensor | None = None,
) -> Decomposition:
    """Ordered components against the original outputs, energies summed over calibration tokens.

    `irreducible` is what the least-squares map of the shifted inputs does not reach.

    Args:
        W: weight, (out, in).
        moments: must hold `shifted` and, of the same tokens in the same order, `C` and `cross` or
            a `deficit`.
        output: unused.
        name: the target, for messages.
        rank: components to hold, all by default.
        blend: share of the original input in the target, 0..1.
        ridge: of the least-squares map, relative; None lets the data choose.
        shrink_in: share of the prior in `C'` where the map is cut.
        sizes: squared sizes of the weight's columns, (in,); of `W` by default.
        root: what the target's weight was multiplied by to give `W`, (rows, out); None if it is it.

    Raises:
        InputError: a moment was not collected, or `blend` is outside 0..1.
        NonFiniteError: `W` or a moment is not finite.
        NotPositiveDefiniteError: `C'` stays singular under the largest damping.
    """
    if not 0 <= blend <= 1:
        raise InputError(f"{name}: blend {blend} is outside 0..1")
    W = weight(W, name=name)
    held = checked_rank(W, rank, name=name)
    sizes = W.square().sum(0) if sizes is None else sizes
    # A map of the inputs alone has the column space of W.
    carries = moments is not None and moments.deficit is not None
    space = ColumnSpace(W, None) if carries else column_space(W)
    options = {"name": name, "blend": blend, "ridge": ridge, "sizes": sizes, "root": root}
    found = anchored_map(space.core, moments, **options)
    C_shifted = statistic(moments, "shifted", W.shape[1], name=name)
    cut = projected(found.V, shrunk(C_shifted, shrink_in, sizes), name=name, rank=held, sizes=sizes)
    return replace(
        cut,
        up=space.lift(cut.up),
        total=cut.total + found.irreducible,
        irreducible=found.irreducible,
        damping=found.damping,
        ridge=found.ridge,
    )


class _Map(NamedTuple):
    """A map of the shifted inputs, and how it was found."""

    V: Tensor
    irreducible: float
    damping: float
    ridge: float


def anchored_map(
    W: Tensor,
    moments: Moments | None,
    *,
    name: str,
    blend: float = 1.0,
    ridge: float | None = None,
    sizes: Tensor | None = None,
    root: Tensor | None = None,
) -> _Map:
    """The least-squares map from shifted inputs to the original outputs of `W`, of any rank.

    Args:
        W: weight, or a root of it with the same products of columns, (rows, in) fp64.
        moments: as for `anchored`.
        name: the target, for messages.
        blend: share of the original input in the target, 0..1.
        ridge: relative; None lets the data choose.
        sizes: squared sizes of the weight's columns, (in,); of `W` by default.
        root: as for `anchored`; only a deficit asks for it.

    Raises:
        InputError, NonFiniteError, NotPositiveDefiniteError: as `anchored`.
    """
    C_shifted = statistic(moments, "shifted", W.shape[1], name=name)
    sizes = W.square().sum(0) if sizes is None else sizes
    seen = W @ C_shifted
    step, left = _left(W, moments, root, seen, name=name)
    step, left = blend * step, blend**2 * left
    if ridge is None:
        ridge = evident_ridge(step, left, C_shifted, tokens_of(moments), sizes=sizes, name=name)
    V, damping = least_squares_map(
        seen + step, C_shifted, start=W, name=name, ridge=ridge, sizes=sizes
    )
    moved = V - W
    left += float(((moved @ C_shifted - 2 * step) * moved).sum())
    return _Map(V, max(0.0, left), damping, ridge)


def _left(
    W: Tensor, moments: Moments | None, root: Tensor | None, seen: Tensor, *, name: str
) -> tuple[Tensor, float]:
    """`Σ r x'ᵀ` (rows, in) and `Σ ‖r‖²` of what W leaves on the shifted inputs, r.

    That is `W (x − x')`, and where the output joins the residual stream also what that has lost.
    """
    if moments is not None and moments.deficit is not None:
        assert moments.deficit_square is not None  # they are summed together
        deficit, square = (
            finite(sums, name=name, what="what the residual stream lacks")
            for sums in (moments.deficit, moments.deficit_square)
        )
        if root is None:
            return deficit, float(square.trace())
        return root @ deficit, float(((root @ square) * root).sum())
    C, D = (statistic(moments, field, W.shape[1], name=name) for field in ("C", "cross"))
    # By products with W: sums of these moments are the largest matrices of a run.
    read, mixed = W @ C, W @ D
    return mixed - seen, float(((read - 2 * mixed + seen) * W).sum())

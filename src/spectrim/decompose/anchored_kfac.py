"""Anchored and double-sided: `min ½ tr(Gᵀ-weighted error of W X − W' X')` along the shifted stream.

With `G = L Lᵀ` the objective `½ ‖Lᵀ (W X − W' X')‖²_F` is the anchored one (`anchored.py`) for the
weight `Lᵀ W`: the least-squares map commutes with `Lᵀ`, and the up factor is brought back by one
triangular solve. It joins what two papers found to help separately, output curvature (KFAC-SVD,
ICML 2026) and the anchored target (AA-SVD, arXiv 2604.02119), in one closed form with ordered
components. Energies are in nats per token, as in `kfac.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectrim.decompose.anchored import anchored
from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.kfac import output_root
from spectrim.decompose.statistics import tokens_of, weight
from spectrim.linalg.scaling import row_and_column_sizes
from spectrim.moments.moments import Moments, OutputMoments


def anchored_kfac(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    blend: float = 1.0,
    shrink_in: float = 0.0,
    shrink_out: float = 0.3,
    ridge: float | None = None,
) -> Decomposition:
    """Ordered components against the original outputs, weighed by what the loss feels of them.

    Args:
        W: weight, (out, in).
        moments: must hold `C`, `shifted` and `cross`.
        output: must hold `G`, from gradients of the summed loss of the original model.
        name: the target, for messages.
        rank: components to hold, all by default.
        blend: share of the original input in the target, 0..1.
        shrink_in: share of the prior in `C'`.
        shrink_out: share of the prior in `G`.
        ridge: of the least-squares map, relative; None lets the data choose.

    Raises:
        InputError: a moment was not collected, or `blend` is outside 0..1.
        NonFiniteError: `W` or a moment is not finite.
        NotPositiveDefiniteError: `G` or `C'` stays singular under the largest damping.
    """
    W = weight(W, name=name)
    rows, columns = row_and_column_sizes(W)
    options: dict[str, Any] = {"name": name, "rank": rank, "blend": blend, "ridge": ridge}
    options |= {"shrink_in": shrink_in, "sizes": columns}
    root = output_root(output, rows, shrink_out, name=name)
    if root is None:
        # No gradient reaches this target: the inputs alone decide, and nothing is at stake.
        return _scaled(anchored(W, moments, **options), 0.0)
    L, damping = root
    inner = anchored(L.mT @ W, moments, root=L.mT, **options)
    up = torch.linalg.solve_triangular(L.mT, inner.up, upper=True)
    per_token = _scaled(inner, 0.5 / tokens_of(moments))
    return replace(per_token, up=up, damping=max(damping, inner.damping))


def _scaled(inner: Decomposition, factor: float) -> Decomposition:
    """The same components with their numbers in other units."""
    return replace(
        inner,
        energy=inner.energy * factor,
        total=inner.total * factor,
        irreducible=inner.irreducible * factor,
        tail=None if inner.tail is None else inner.tail * factor,
    )

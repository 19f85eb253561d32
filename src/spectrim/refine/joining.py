"""A low-rank update joined with a compressed layer, at the layer's rank or at a larger one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectrim.decompose.balance import balanced
from spectrim.errors import ModelError
from spectrim.layers.layout import layout_of
from spectrim.layers.swap import dense_of


def join(layer: Any, up: Tensor, down: Tensor, *, grow: bool = False) -> tuple[nn.Module, float]:
    """`layer + up · down` as one layer of the same kind.

    Rank k takes the sum's best approximation by Frobenius norm; a rank of k + r holds the sum, and
    so does the dense layer that comes back where that is full rank.

    Args:
        layer: a compressed layer of native numbers, which stays as it is.
        up: (out, r).
        down: (r, in).
        grow: take rank k + r instead of k.

    Returns:
        The layer, and what was lost of the update, rounding included: `‖lost‖ / ‖up · down‖`.

    Raises:
        ModelError: the layer has coded weights.
    """
    check_joinable(layer, "a layer")
    first, second = layer.factors()
    update = up.to(first) @ down.to(first)
    U = torch.cat([first, up.to(first)], 1)
    V = torch.cat([second, down.to(second)], 0)
    smaller = min(layer.out_features, layer.in_features)
    rank = min(U.shape[1], smaller) if grow else layer.rank
    if rank == smaller:
        joined: Any = dense_of(layer, U @ V)
        found = joined.weight.T if layer.transposed else joined.weight
    else:
        made = (
            layout_of(layer.storage)
            .layer_class()
            .from_factors(
                *balanced(U, V, rank), layer.bias, dtype=layer.weight.dtype, device=U.device
            )
        )
        made.transposed = layer.transposed
        joined = made.train(layer.training)
        found = joined.dense_weight()
    size = float(update.norm())
    return joined, float((U @ V - found.detach().to(U)).norm()) / size if size > 0 else 0.0


def check_joinable(layer: Any, where: str) -> None:
    """Refuse a layer that cannot take an update in.

    Raises:
        ModelError: it has coded weights; `where` is its name.
    """
    if layer.weights != "native":
        raise ModelError(
            f"{where} ({layer.out_features}, {layer.in_features}) has {layer.weights} weights and "
            "cannot take an adapter in: rounding again would lose most of it; keep the adapter "
            "beside the model, or merge it into the dense model and compress that"
        )

"""Put a compressed layer in the place of a dense one, and the dense one back.

Dense layers are `nn.Linear`, which stores (out, in), and transformers' `Conv1D`, which stores
(in, out). A compressed layer remembers which of the two it replaced, so that the dense layer that
comes back saves under the shape that plain transformers expects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectrim.errors import ModelError
from spectrim.model.weights import get_module, new_linear, replace_module


def is_compressed(module: nn.Module) -> bool:
    """Whether the module is one of spectrim's layers."""
    return bool(getattr(module, "is_compressed_layer", False))


def is_dense_linear(module: Any) -> bool:
    """Whether the module is a dense linear layer that spectrim can replace."""
    return isinstance(module, (nn.Linear, Conv1D))


def dense_shape(module: Any, name: str) -> tuple[int, int]:
    """(out_features, in_features) of a dense linear layer, whichever way round it stores them."""
    if not is_dense_linear(module):
        raise ModelError(
            f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D can be compressed"
        )
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def compressed_layers(model: nn.Module) -> dict[str, Any]:
    """Module path -> compressed layer, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if is_compressed(module)}


def swap_in(model: nn.Module, name: str, layer: Any) -> nn.Module:
    """Replace the layer called `name` by the compressed `layer` and return what was there.

    The replaced module may be dense or already compressed (a refit of the same target). The new
    layer takes over its training mode.

    Raises:
        ModelError: the name does not exist, is not a linear layer, or has another shape.
    """
    old: Any = get_module(model, name)
    if is_compressed(old):
        expected = (old.out_features, old.in_features)
        layer.transposed = old.transposed
    else:
        expected = dense_shape(old, name)
        layer.transposed = isinstance(old, Conv1D)
    found = (layer.out_features, layer.in_features)
    if found != expected:
        raise ModelError(
            f"{name} maps {expected[1]} features to {expected[0]}, the layer meant for it maps "
            f"{found[1]} to {found[0]}"
        )
    replace_module(model, name, layer.train(old.training))
    return old


def restore_dense(model: nn.Module, name: str, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Multiply the compressed layer called `name` out and put the dense layer back.

    Args:
        model: holds the layer.
        name: module path of a compressed layer.
        dtype: of the dense weight; None keeps the dtype of the stored factors.

    Returns:
        The dense layer: `Conv1D` where one was replaced, `nn.Linear` otherwise.
    """
    layer: Any = get_module(model, name)
    dense = dense_of(layer, layer.dense_weight(), dtype=dtype)
    replace_module(model, name, dense)
    return dense


def dense_of(layer: Any, W: Tensor, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A dense layer with the weight W (out, in), and the bias and mode of a compressed layer.

    It is `Conv1D` where the layer replaced one; `dtype` is by default that of the stored parts.
    """
    dtype = dtype or layer.weight.dtype
    W, bias = W.to(dtype), layer.bias
    if layer.transposed:
        dense: nn.Module = Conv1D(layer.out_features, layer.in_features).to("meta")
        dense.weight = nn.Parameter(W.T.contiguous())
    else:
        dense = new_linear(layer.in_features, layer.out_features, bias is not None)
        dense.weight = nn.Parameter(W)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    elif layer.transposed:
        dense.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=W.device))
    return dense.train(layer.training)

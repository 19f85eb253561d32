"""Memory order of the factors for reading one token after another on a CPU.

A product with one token reads every number of a factor once, so that it is as fast as memory
allows, and memory is fastest along long contiguous stretches. An `up` factor (out, k) has many
short rows; stored by columns it has few long ones. In fp32 that makes it up to 1.4 times faster
(`benchmarks/inference.py`); in bf16 the CPU kernels for that order are many times slower, and on
an accelerator it makes no difference, so both keep their rows.

Only the strides change: shapes, values, names and files stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from spectrim.layers.swap import compressed_layers

__all__ = ["arrange"]


def arrange(model: nn.Module) -> int:
    """Give every plain factor of the compressed layers the faster memory order, in place.

    Run it again after changing the model's dtype or device: both keep the order of memory, and an
    order made for fp32 is a bad one for bf16.

    Returns:
        The number of factors that are now stored by columns.
    """
    columns = 0
    for layer in compressed_layers(model).values():
        for factor in layer.children():
            if type(factor) is nn.Linear and type(factor.weight) is nn.Parameter:
                columns += _arrange(factor)
    return columns


def _arrange(factor: nn.Linear) -> bool:
    weight = factor.weight
    tall = weight.shape[0] > weight.shape[1] > 1
    by_columns = tall and weight.dtype == torch.float32 and weight.device.type == "cpu"
    if by_columns:
        weight.data = weight.data.mT.contiguous().mT
    else:
        weight.data = weight.data.contiguous()
    return by_columns

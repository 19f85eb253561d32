"""Round a matrix to 8-bit or 4-bit integers and back.

    int8   W[i, j] = scale[i] q[i, j]                   q in -127..127, scale fp32, one per row
    int4   W[i, j] = scale[i, g] (q[i, j] - 8) + zero[i, g]
                                                        q in 0..15, g the group of column j

Scale and zero point of int4 are bf16; zero is the value of the middle code, so that it stays small
and loses little by that. Codes are chosen against the scales as they are stored. Two 4-bit codes
share a byte, the even column in its low half; a row is padded to whole groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["INT4_MIDDLE", "from_int4", "from_int8", "to_int4", "to_int8", "unpacked_int4"]

INT8_TOP = 127
INT4_TOP = 15
INT4_MIDDLE = 8


def to_int8(W: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (rows, columns) and scales fp32 (rows,) of a matrix in any floating dtype."""
    W = W.to(torch.float64)
    largest = W.abs().amax(dim=1) if W.shape[1] else W.new_zeros(W.shape[0])
    scale = (largest / INT8_TOP).to(torch.float32)
    # A row of zeros, or one below what fp32 holds, has scale 0 and codes 0.
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).to(torch.float64)
    codes = (W / divisor[:, None]).round().clamp(-INT8_TOP, INT8_TOP)
    return (codes * (scale > 0)[:, None]).to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 matrix (rows, columns) that the codes stand for."""
    return codes.to(torch.float32) * scale[:, None]


def to_int4(W: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 (rows, groups * group / 2), scales and zeros bf16 (rows, groups).

    Args:
        W: the matrix (rows, columns) in any floating dtype.
        group: columns that share a scale, an even number.
    """
    rows, columns = W.shape
    groups = -(-columns // group)
    W = W.to(torch.float64)
    # The last column fills the last group: padding must not widen its range.
    padding = W[:, -1:].expand(rows, groups * group - columns)
    parts = torch.cat([W, padding], dim=1).view(rows, groups, group)
    low, high = parts.amin(dim=2), parts.amax(dim=2)
    scale = ((high - low) / INT4_TOP).to(torch.bfloat16)
    zero = (low + INT4_MIDDLE * scale.to(torch.float64)).to(torch.bfloat16)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).to(torch.float64)
    codes = (parts - zero.to(torch.float64)[..., None]) / divisor[..., None] + INT4_MIDDLE
    codes = codes.round().clamp(0, INT4_TOP).to(torch.uint8).view(rows, groups * group)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale, zero


def unpacked_int4(codes: Tensor) -> Tensor:
    """One uint8 code per column: (rows, bytes) -> (rows, 2 bytes)."""
    return torch.stack([codes & INT4_TOP, codes >> 4], dim=-1).flatten(-2)


def from_int4(codes: Tensor, scale: Tensor, zero: Tensor, columns: int) -> Tensor:
    """The fp32 matrix (rows, columns) that the packed codes stand for."""
    rows, groups = scale.shape
    if rows * groups == 0:
        return torch.zeros(rows, columns, dtype=torch.float32, device=codes.device)
    centered = unpacked_int4(codes).to(torch.float32).view(rows, groups, -1) - INT4_MIDDLE
    restored = centered * scale.to(torch.float32)[..., None] + zero.to(torch.float32)[..., None]
    return restored.view(rows, -1)[:, :columns]

"""Codes of b bits side by side: eight of them in b bytes, the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

TOGETHER = 8
"""Codes that are packed together, into as many bytes as a code has bits."""


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) in 0..2^bits - 1, columns a multiple of 8 -> uint8 (rows, columns bits / 8).

    Args:
        codes: any integer dtype.
        bits: of a code, at most 4.
    """
    rows, columns = codes.shape
    parts = codes.to(torch.int32).reshape(rows, columns // TOGETHER, TOGETHER)
    # The eight codes fill disjoint bits of one word of at most 32, whose sign bit is one of them.
    words = parts[..., 0].clone()
    for i in range(1, TOGETHER):
        words |= parts[..., i] << (bits * i)
    found = [(words >> (8 * j)) & 255 for j in range(bits)]
    return torch.stack(found, dim=-1).to(torch.uint8).flatten(1)


def unpacked_codes(stored: Tensor, bits: int) -> Tensor:
    """uint8 (rows, bytes) -> uint8 (rows, 8 bytes / bits), the inverse of `packed_codes`."""
    if TOGETHER % bits == 0:  # no code crosses a byte
        codes = [(stored >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
        return torch.stack(codes, dim=-1).flatten(1)
    parts = stored.unflatten(1, (stored.shape[1] // bits, bits)).to(torch.int32)
    words = parts[..., 0].clone()
    for j in range(1, bits):
        words |= parts[..., j] << (8 * j)
    codes = [(words >> (bits * i)) & (2**bits - 1) for i in range(TOGETHER)]
    return torch.stack(codes, dim=-1).to(torch.uint8).flatten(1)

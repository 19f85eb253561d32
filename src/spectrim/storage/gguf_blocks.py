"""Codes and scales as blocks of GGUF: 32 numbers of a row, their scale in fp16 before them.

`Q8_0` is a scale and 32 bytes, `Q4_0` a scale and 32 codes of 4 bits offset by 8, `Q4_1` a scale,
the value of code 0 and the codes; code i shares a byte with code i + 16, in its lower half. Groups
of 64 and 128 become blocks with equal scales. Codes of 2 and 3 bits fit into `Q4_0` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectrim.errors import NumericalError

BLOCK = 32
"""Numbers of a row that share a scale."""


def block_type(bits: int, zeros: bool) -> str:
    """The name of the type that holds codes of so many bits exactly."""
    if bits > 4:
        return "Q8_0"
    return "Q4_1" if zeros else "Q4_0"


def blocks(codes: Tensor, scales: Mapping[str, Tensor], bits: int, *, name: str) -> Tensor:
    """The bytes of a matrix, (rows, columns / 32 times the bytes of a block) uint8.

    Args:
        codes: signed, (rows, columns), columns a multiple of 32.
        scales: `scale` and perhaps `zero`, the value of code 0, (rows, groups).
        bits: of a code.
        name: the matrix, for messages.

    Raises:
        NumericalError: a scale is too large for fp16.
    """
    rows, columns = codes.shape
    per_row = columns // BLOCK
    scale = _halves(scales["scale"], per_row, name)
    parts = codes.view(rows, per_row, BLOCK)
    if block_type(bits, "zero" in scales) == "Q8_0":
        head, body = [scale], parts.to(torch.int8).view(torch.uint8)
    else:
        shifted = (parts + 8).to(torch.uint8)
        body = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
        head = [scale]
        if "zero" in scales:
            lowest = scales["zero"].double() - 8 * scales["scale"].double()
            head.append(_halves(lowest, per_row, name))
    stored = [one.view(torch.uint8).view(rows, per_row, 2) for one in head]
    return torch.cat([*stored, body], dim=2).reshape(rows, -1)


def _halves(values: Tensor, per_row: int, name: str) -> Tensor:
    """Numbers per group as fp16, one per block."""
    repeated = values.repeat_interleave(-(-per_row // values.shape[1]), dim=1)[:, :per_row]
    found = repeated.to(torch.float16)
    if not bool(torch.isfinite(found).all()):
        raise NumericalError(
            f"{name}: a scale is too large for fp16, in which GGUF keeps scales; export it --dense"
        )
    return found.contiguous()

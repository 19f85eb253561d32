"""The model's own floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectrim.formats.number_format import NumberFormat, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectrim.linalg.rounding import Metric


class Native(NumberFormat):
    """bf16, fp16 or fp32, whatever the checkpoint has."""

    name = "native"
    coded = integer = False
    main = "weight"

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[Shape, str]]:
        """The matrix itself."""
        return {"weight": ((rows, columns), "native")}

    def encode(
        self, W: Tensor, metric: Metric | None = None, *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A cast; its error is too small to be worth shaping."""
        return {"weight": W.to(dtype)}

    def decode(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """The matrix in fp32 or better."""
        import torch

        weight = tensors["weight"]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def reads_codes(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """There are none."""
        return True

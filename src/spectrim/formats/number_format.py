"""What every number format says about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectrim.linalg.rounding import Grid, Metric

Shape: TypeAlias = tuple[int, ...]

BYTES = {"int8": 1, "uint8": 1, "fp8": 1, "fp32": 4, "bf16": 2}
"""Bytes of a stored number; `native` numbers have those of the model's dtype."""


CODED = (4, 8)
"""Bits of codes that the kernel for few tokens multiplies as they are stored."""


class NumberFormat(ABC):
    """How a matrix (rows, columns) is kept.

    Attributes:
        name: the word for it.
        coded: whether the stored tensors are codes and scales.
        integer: whether codes are integers, which is what kernels read and other files hold.
        main: the tensor that takes the linear layer's own name on disk. Where the codes have the
            shape of the matrix it is another one, so that no loader takes codes for weights.
        rounding_share: loss of rounding to nearest, as a share of losing the whole matrix.
        reference: whether comparisons show the dense model in it.
        kernel: a product with the codes in an order of their own, None where there is none.
    """

    name: str
    coded: bool = True
    integer: bool = True
    main: str = "scale"
    rounding_share: float = 0.0
    reference: bool = False
    kernel: Kernel | None = None

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> dict[str, tuple[Shape, str]]:
        """Name -> (shape, int8|uint8|fp8|fp32|bf16|native) of what a matrix is stored as."""

    def bytes(self, rows: Any, columns: Any, dtype_bytes: int) -> Any:
        """Bytes of a matrix; rows and columns may be arrays of sizes."""
        total: Any = 0
        for shape, number in self.tensors(rows, columns).values():
            size: Any = BYTES.get(number, dtype_bytes)
            for side in shape:
                size = size * side
            total = total + size
        return total

    @abstractmethod
    def encode(
        self, W: Tensor, metric: Metric | None = None, *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of `W` (rows, columns), any floating dtype.

        Args:
            W: the matrix.
            metric: of its inputs; the error `E` is then made small in `tr(E C Eᵀ)`, one column
                after the other. Without it every number is rounded to nearest.
            dtype: of native numbers.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """The matrix that the tensors stand for, in fp32 or better."""

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """`x Wᵀ`, (..., columns) -> (..., rows), in the dtype of x."""
        from torch.nn.functional import linear

        return linear(x, self.decode(tensors, columns).to(x.dtype))

    def reads_codes(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """Whether `multiply` reads what is stored where it lies, without a copy of the matrix."""
        return False

    def fast(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether products on a device take about as long as those of plain numbers, or less."""
        return not self.coded or (self.kernel is not None and self.kernel.at_hand(device, dtype))

    def path(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
        """How a product with these runs, in words for people."""
        return "restored for every product"


class Kernel(ABC):
    """A product with codes that lie in an order of the kernel's own."""

    name: str

    @abstractmethod
    def obstacle(self, tensors: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> str:
        """Why it cannot multiply these, or is not the faster way to; empty if it can and is."""

    @abstractmethod
    def at_hand(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a device has it for a model's dtype."""

    @abstractmethod
    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors in the kernel's order."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `pack`, bit for bit."""

    @abstractmethod
    def multiply(self, x: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
        """(tokens, columns) -> (tokens, rows)."""


class Coded(NumberFormat):
    """A format of codes on a grid of scales and offsets.

    Attributes:
        bits: of a code.
    """

    bits: int

    @abstractmethod
    def scales(self, W: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Scales (and zeros) of `W` in fp64, as they are stored.

        Args:
            W: the matrix, fp64.
            importance: what a squared error costs by column, (columns,); None if all are equal.
        """

    @abstractmethod
    def grid(self, scales: Mapping[str, Tensor], columns: int) -> Grid:
        """The values that codes can stand for, by entry of the matrix."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Codes of the grid, (rows, columns), as they are stored."""

    @abstractmethod
    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """The inverse of `pack`."""

    def fast(self, device: torch.device, dtype: torch.dtype) -> bool:
        """By the kernel of its own, or by ours for few tokens."""
        from spectrim.devices import runs_triton

        ours = self.integer and self.bits in CODED and runs_triton(device)
        return ours or super().fast(device, dtype)

    def encode(
        self, W: Tensor, metric: Metric | None = None, *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Codes and scales; see `NumberFormat.encode`."""
        W = W.double()
        scales = self.scales(W, None if metric is None else metric.importance)
        grid = self.grid(scales, W.shape[1])
        codes = grid.codes(W) if metric is None else metric.codes(W, grid)
        return {"codes": self.pack(codes), **scales}

    def decode(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """The fp32 matrix (rows, columns)."""
        grid = self.grid(tensors, columns)
        return grid.values(self.unpack(tensors["codes"], columns))

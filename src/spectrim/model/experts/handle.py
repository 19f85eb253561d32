"""What the model's code holds when it asks a stack of experts for weights, and products with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from spectrim.errors import ModelError
from spectrim.model.experts.layout import ExpertLayout


class _Stack(Protocol):
    """What a handle has to know of the module that stands for the parameter."""

    layout: ExpertLayout
    together: Callable[[Tensor, Tensor], Tensor] | None

    def __len__(self) -> int: ...
    def run(self, expert: int, x: Tensor) -> Tensor: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class Handle:
    """The parameter, one expert's slice of it, or the slices of some experts.

    Args:
        stack: the module that stands for the parameter.
        index: None for all experts, a number, or expert numbers (S,).
        flipped: whether the last two dimensions are exchanged.
    """

    def __init__(self, stack: _Stack, index: int | Tensor | None = None, flipped: bool = False):
        self.stack = stack
        self.index = index
        self.flipped = flipped

    @property
    def reads_columns(self) -> bool:
        """Whether the last dimension is the input's: (..., out, in)."""
        return self.stack.layout.transposed == self.flipped

    @property
    def shape(self) -> torch.Size:
        """Of the tensor this stands for."""
        sides = self.stack.layout.shape[1:]
        sides = sides[::-1] if self.flipped else sides
        if self.index is None:
            return torch.Size((len(self.stack), *sides))
        return torch.Size((self.index.numel(), *sides) if isinstance(self.index, Tensor) else sides)

    @property
    def ndim(self) -> int:
        """Of the tensor this stands for."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """See `ExpertStack.dtype`."""
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        """Of the experts."""
        return self.stack.device

    def size(self, dim: int | None = None) -> Any:
        """Of the tensor this stands for."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Of the tensor this stands for."""
        return self.ndim

    def data_ptr(self) -> int:
        """Kernels ask whether this is aligned."""
        return 0

    def contiguous(self) -> Handle:
        """Itself."""
        return self

    def to(self, *_args: Any, **_kwargs: Any) -> Handle:
        """Itself: the experts' layers take tokens as they come."""
        return self

    def __getitem__(self, index: Any) -> Handle:
        if self.index is not None or isinstance(index, (slice, tuple)):
            raise ModelError(f"experts are asked for {index!r}, expected a number or numbers")
        if isinstance(index, Tensor) and index.ndim:
            return Handle(self.stack, index.reshape(-1), self.flipped)
        return Handle(self.stack, int(index) % len(self.stack), self.flipped)

    def transpose(self, first: int, second: int) -> Handle:
        """The last two dimensions exchanged."""
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise ModelError(f"experts are transposed along {first} and {second}")
        return Handle(self.stack, self.index, not self.flipped)

    def permute(self, *order: int) -> Handle:
        """The last two dimensions exchanged, or nothing."""
        wanted = tuple(d % self.ndim for d in (order[0] if len(order) == 1 else order))  # type: ignore[union-attr]
        usual = tuple(range(self.ndim))
        if wanted == usual:
            return self
        if wanted != (*usual[:-2], usual[-1], usual[-2]):
            raise ModelError(f"experts are permuted to {wanted}")
        return self.mT

    @property
    def mT(self) -> Handle:
        """The last two dimensions exchanged."""
        return Handle(self.stack, self.index, not self.flipped)

    T = mT

    def t(self) -> Handle:
        """The last two dimensions exchanged."""
        return self.mT

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Products of tokens with this."""
        product = _PRODUCTS.get(getattr(function, "__name__", ""))
        if product is None:
            raise ModelError(
                f"a model's experts use their weights in {function!r}; spectrim follows linear, "
                "matmul, bmm and grouped_mm"
            )
        return product(*args, **(kwargs or {}))

    def run(self, expert: int, x: Tensor) -> Tensor:
        """One expert's output for tokens (..., in)."""
        return self.stack.run(expert, x)

    def empty(self, x: Tensor, *shape: int) -> Tensor:
        """Room for outputs."""
        return x.new_zeros(*shape, self.stack.layout.out_features)


def _linear_product(x: Tensor, weight: Handle, bias: Tensor | None = None) -> Tensor:
    _expect(weight, columns=True, single=True)
    y = weight.run(weight.index, x)  # type: ignore[arg-type]
    return y if bias is None else y + bias


def _matmul(x: Tensor, weight: Handle) -> Tensor:
    if not isinstance(weight, Handle):
        raise ModelError("experts multiply tokens from the left: expected tokens @ weights")
    if weight.index is None:
        return _bmm(x, weight)
    _expect(weight, columns=False, single=True)
    return weight.run(weight.index, x)  # type: ignore[arg-type]


def _bmm(x: Any, weight: Any) -> Tensor:
    """(S, T, in) times (S, in, out), or (S, out, in) times (S, in, T)."""
    if isinstance(x, Handle):
        _expect(x, columns=True)
        return _each(x, weight.mT).mT
    _expect(weight, columns=False)
    return _each(weight, x)


def _each(weight: Handle, x: Tensor) -> Tensor:
    """Output s (T, out) is that of expert `index[s]`, or of expert s, for the tokens x[s]."""
    if weight.index is None:
        return torch.stack([weight.run(e, x[e]) for e in range(len(weight.stack))])
    index: Any = weight.index
    rows, pieces = [], []
    for expert in index.unique().tolist():
        mine = (index == expert).nonzero().flatten()
        rows.append(mine)
        pieces.append(weight.run(expert, x[mine]))
    return torch.cat(pieces)[torch.cat(rows).argsort()]


def _grouped(x: Tensor, weight: Handle, offs: Tensor | None = None, **_kwargs: Any) -> Tensor:
    """Tokens (S, in) sorted by expert; expert e has those before `offs[e]`."""
    if weight.stack.together is None:
        return _one_by_one(x, weight, offs)
    _expect(weight, columns=False)
    assert offs is not None  # without it the product would have other operands
    return weight.stack.together(x, offs)


def _one_by_one(x: Tensor, weight: Handle, offs: Tensor | None = None, **_kwargs: Any) -> Tensor:
    """The same, where a device has no product of groups."""
    _expect(weight, columns=False)
    assert offs is not None
    pieces, start = [], 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            pieces.append(weight.run(expert, x[start:end]))
        start = end
    if start < x.shape[0]:
        pieces.append(weight.empty(x, x.shape[0] - start))  # nobody's tokens
    return torch.cat(pieces) if pieces else weight.empty(x, 0)


def _expect(weight: Any, *, columns: bool, single: bool = False) -> None:
    fits = isinstance(weight, Handle) and weight.reads_columns == columns
    if not fits or single != isinstance(weight.index, int):
        raise ModelError(
            "experts multiply by their weights in another orientation than when traced"
        )


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear_product,
    "matmul": _matmul,
    "mm": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": lambda weight, x: _matmul(x, weight),
    "bmm": _bmm,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _one_by_one,
    "grouped_mm_fallback.default": _one_by_one,
}

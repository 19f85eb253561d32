"""The parts of compressed layers: `nn.Linear`, or a linear layer of codes, `y = W x + b`.

`QuantizedLinear` stands in for the `nn.Linear` parts of a compressed layer. Its tensors and its
product are those of its number format (`spectrim.formats`). Scales keep their dtype whatever the
model is cast to: they are part of the stored numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.formats import format_of
from spectrim.layers.layout import layout_of
from spectrim.linalg.rounding import Metric
from spectrim.model.weights import new_linear

_DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are codes, its tensors named as its format names them.

    Attributes:
        bias: (out,) or None.
        weights: name of the number format.
        dtype: of the model around it, in which `weight` is given.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weights: str,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weights = weights
        self.format = format_of(weights)
        self.dtype = dtype or torch.get_default_dtype()
        for name, (shape, number) in self.format.tensors(out_features, in_features).items():
            self.register_buffer(name, torch.zeros(shape, dtype=_DTYPES[number], device=device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_weight(
        cls,
        W: Tensor,
        bias: Tensor | None,
        weights: str,
        *,
        dtype: torch.dtype,
        metric: Metric | None = None,
    ) -> QuantizedLinear:
        """Round `W` (out, in) of any floating dtype, in a metric of its inputs or to nearest.

        The bias is rounded to `dtype`.
        """
        layer = cls(
            W.shape[1], W.shape[0], weights, bias=bias is not None, device="meta", dtype=dtype
        )
        for name, tensor in layer.format.encode(W.detach(), metric, dtype=dtype).items():
            setattr(layer, name, tensor.contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(W.device, dtype, copy=True))
        return layer

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """The format's tensors."""
        names = self.format.tensors(self.out_features, self.in_features)
        return {name: getattr(self, name) for name in names}

    @property
    def reads_codes(self) -> bool:
        """Whether products work on the codes where they lie, without a copy of the matrix."""
        return self.format.reads_codes(self.stored, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in), restored in the model's dtype."""
        return self.wide_weight().to(self.dtype)

    def wide_weight(self) -> Tensor:
        """The matrix (out, in) in fp32, without further rounding."""
        return self.format.decode(self.stored, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.format.multiply(x, self.stored, self.in_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weights={self.weights}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast, but for the dtype of the scales; the model's dtype is noted."""
        before = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


@contextmanager
def trained_scales(modules: Iterable[nn.Module]) -> Iterator[None]:
    """For the time of the context, scales and zero points are parameters; codes stay as they are.

    A code says which value of its grid a number has, and a small step of a training would change
    none of them; what can follow the training is the grid.
    """
    layers = [m for root in modules for m in root.modules() if isinstance(m, QuantizedLinear)]
    moved = [(layer, name) for layer in layers for name in layer.stored if name != "codes"]
    for layer, name in moved:
        held = layer.stored[name]
        del layer._buffers[name]
        layer.register_parameter(name, nn.Parameter(held, requires_grad=False))
    try:
        yield
    finally:
        for layer, name in moved:
            trained = layer.stored[name].detach()
            del layer._parameters[name]
            layer.register_buffer(name, trained)


def rounded(W: Tensor, weights: str, dtype: torch.dtype, metric: Metric | None = None) -> Tensor:
    """`W` as it comes back from storage in one format, fp64."""
    one = format_of(weights)
    return one.decode(one.encode(W.detach(), metric, dtype=dtype), W.shape[1]).double()


def wide_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear part in fp32 or better, however it is stored."""
    restore: Any = getattr(linear, "wide_weight", None)
    if restore is not None:  # codes, in whatever order they lie
        return restore()
    weight: Any = linear.weight
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def part_of(
    W: Tensor,
    bias: Tensor | None,
    weights: str,
    *,
    dtype: torch.dtype,
    metric: Metric | None = None,
) -> nn.Linear | QuantizedLinear:
    """A part that holds `W` (out, in) in one number format; shares no memory with it."""
    if format_of(weights).coded:
        return QuantizedLinear.from_weight(W, bias, weights, dtype=dtype, metric=metric)
    part = new_linear(W.shape[1], W.shape[0], bias is not None, dtype=dtype)
    part.weight = nn.Parameter(W.detach().to(dtype, copy=True).contiguous())
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().to(W.device, dtype, copy=True))
    return part


def quantize_layer(layer: Any, weights: str, *, dtype: torch.dtype) -> Any:
    """Round every part of a compressed layer to nearest, in place; returns the layer.

    The bias is rounded to `dtype`.
    """
    for part, one in layout_of(layer.storage, weights).formats.items():
        old = layer.get_submodule(part)
        new = part_of(wide_weight(old), old.bias, one.name, dtype=dtype)
        setattr(layer, part, new.train(layer.training))
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    layer.weights = weights
    return layer


def skeleton(
    storage: str,
    weights: str,
    shape: tuple[int, int],
    rank: int | None,
    *,
    bias: bool,
    dtype: torch.dtype,
) -> Any:
    """A compressed layer on the meta device, ready to be loaded into.

    Args:
        storage: a storage kind; `dense` with coded weights only.
        weights: number formats of its parts.
        shape: (out, in).
        rank: None for dense storage and only for it.
        bias: whether it has one.
        dtype: of native numbers and of the bias.
    """
    layout = layout_of(storage, weights)
    layer = layout.layer_class().empty(shape[1], shape[0], rank, bias, dtype=dtype)
    for part, one in layout.formats.items():
        if one.coded:
            old = layer.get_submodule(part)
            new = QuantizedLinear(
                old.in_features,
                old.out_features,
                one.name,
                bias=old.bias is not None,
                device="meta",
                dtype=dtype,
            )
            setattr(layer, part, new)
    layer.weights = weights
    return layer


def described(layer: Any) -> dict[str, Any]:
    """What it takes to make room for a compressed layer, JSON-ready; see `built`."""
    native = layer.dtype if hasattr(layer, "dtype") else layer.weight.dtype
    return {
        "storage": layer.storage,
        "weights": layer.weights,
        "shape": [layer.out_features, layer.in_features],
        "rank": layer.rank,
        "bias": layer.bias is not None,
        "dtype": str(native).removeprefix("torch."),
    }


def built(said: Mapping[str, Any]) -> Any:
    """A layer on the meta device of the form that was `described`."""
    return skeleton(
        said["storage"],
        said["weights"],
        tuple(said["shape"]),
        said["rank"],
        bias=said["bias"],
        dtype=getattr(torch, said["dtype"]),
    )

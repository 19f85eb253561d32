"""Weights in the order in which the CPU's matrix kernels read them.

A product with one token reads every number of a weight once and is as fast as memory allows, if it
reads long stretches. `nn.Linear` keeps rows, and for products of few tokens torch's bf16 kernel
reaches a third of the memory's speed with them, less where rows are short, which is what an `up`
factor has. oneDNN, which torch brings along, multiplies two to four times faster with weights that
were put into its own blocked order once; `torch.compile` does the same when it freezes a model.

`prepack` does it for a model in eager mode, for compressed and for dense layers alike: comparing a
prepacked compressed model with a dense one that was not would be comparing kernels, not models.
It is for running, not for training: the blocked weight is no parameter and has no gradient.
Names and numbers of a state dict stay as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.devices import on_host
from spectrim.errors import ModelError
from spectrim.layers.quantized import QuantizedLinear
from spectrim.serve.prepack_codes import PrepackedCodes, can_prepack_codes

_HAS_ONEDNN = torch.backends.mkldnn.is_available()

TOKENS = 64
"""Tokens per product for which oneDNN chooses the order. Orders chosen for 1 or for a prompt were
as fast where they were meant for and slower elsewhere."""

# The overload itself: looking it up for every product costs as much as a small product.
_multiply: Any = torch.ops.mkldnn._linear_pointwise.default if _HAS_ONEDNN else None


class PrepackedLinear(nn.Module):
    """A linear layer whose weight (out, in) lies in oneDNN's order.

    Attributes:
        bias: (out,) or None, as in the layer that it stands for.
        dtype: of the weight.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self._pack(linear.weight.detach())
        self.train(linear.training)

    def _pack(self, weight: Tensor) -> None:
        if not can_prepack(weight):
            raise ModelError(
                f"a prepacked weight of {tuple(weight.shape)} cannot become {weight.dtype} on "
                f"{weight.device}: this machine's oneDNN does not multiply it; cast or move the "
                "model first and prepack it then"
            )
        self.dtype = weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TOKENS)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) in the order of its rows, a copy made at every access."""
        return self._packed.to_dense()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrix."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.compiler.is_compiling():
            return _outside_the_graph(x, self._packed, self.bias)
        return _multiply(x, self._packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast: the rows are restored, and packed again for what they became."""
        super()._apply(fn, recurse)
        self._pack(fn(self.weight))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *told: Any) -> None:
        # Local metadata, strictness, then lists: missing keys, unexpected keys, errors.
        metadata, strict, missing_keys, _, error_msgs = told
        key, shape = f"{prefix}weight", (self.out_features, self.in_features)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, [], error_msgs
        )
        weight = state_dict.get(key)
        if weight is None:
            missing_keys.append(key)
        elif tuple(weight.shape) != shape:
            error_msgs.append(f"{key} has shape {tuple(weight.shape)}, expected {shape}")
        else:
            self._pack(weight.detach().to(self.dtype))

    def __getstate__(self) -> dict[str, Any]:
        """The blocked order has no storage that could be copied; rows have."""
        return self.__dict__ | {"_packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the copied rows."""
        super().__setstate__(state)
        self._pack(self._packed)


def _plainly(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply(x, packed, bias, "none", [], "")


# A compiler cannot look into the blocked order, and prepacks constant weights by itself.
_outside_the_graph: Any = torch.compiler.disable(_plainly)


def can_prepack(weight: Tensor) -> bool:
    """Whether this machine's oneDNN multiplies with such a weight."""
    if not on_host(weight.device) or not _HAS_ONEDNN:
        return False
    supported = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return weight.dtype in supported and bool(supported[weight.dtype]())


def prepack(model: nn.Module) -> int:
    """Put the weights of a model's linear layers into the order of the kernels, in place.

    Integer weights go into the order of their format's kernel, where it has one that needs it.
    Weights that several modules share (an output head tied to the embeddings, joined factors of
    `fuse`) stay as they are.

    Returns:
        The number of matrices that were packed; 0 on a machine or in a dtype without the kernels.
    """
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear) and can_prepack_codes(child):
                setattr(parent, name, PrepackedCodes(child))
                count += 1
            if type(child) is not nn.Linear or type(child.weight) is not nn.Parameter:
                continue
            if owners[id(child.weight)] == 1 and can_prepack(child.weight):
                setattr(parent, name, PrepackedLinear(child))
                count += 1
    return count

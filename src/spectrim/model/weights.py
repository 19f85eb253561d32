"""Reading, writing and replacing linear modules in one orientation, and refusing unfit models."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectrim.devices import HOST
from spectrim.errors import ModelError, NonFiniteError


def is_linear(module: nn.Module) -> bool:
    """Whether the module is `nn.Linear` or the `Conv1D` of transformers."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in, out)."""
    return isinstance(module, Conv1D)


class _Drawn(nn.Linear):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def new_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    device: torch.device | str | None = "meta",
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """An `nn.Linear`, on the meta device unless said otherwise.

    torch spends a millisecond on random numbers for a layer without memory, and a large mixture
    has tens of thousands of them.
    """
    layer = _Drawn(in_features, out_features, bias, device, dtype)
    layer.__class__ = nn.Linear
    return layer


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module at a path such as `model.layers.0.self_attn.q_proj`.

    Raises:
        ModelError: if there is no module at that path.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {name!r}") from error


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` at the path `name` and return the module that was there before."""
    before = get_module(model, name)
    parent, _, child = name.rpartition(".")
    setattr(get_module(model, parent), child, module)
    return before


def _weight(module: nn.Module) -> Tensor:
    if not is_linear(module):
        raise ModelError(
            f"expected nn.Linear or Conv1D, found {type(module).__name__}: it has no dense weight"
        )
    return module.weight  # type: ignore[return-value]


def read_weight(module: nn.Module) -> Tensor:
    """The weight as (out, in): a detached view of the module's own memory, not a copy."""
    W = _weight(module).detach()
    return W.mT if is_transposed(module) else W


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Overwrite the weight with one given as (out, in); cast to the module's dtype and device.

    Raises:
        ModelError: if the shape differs or the module is not linear.
    """
    own = read_weight(module)
    if weight.shape != own.shape:
        raise ModelError(f"weight of shape {tuple(weight.shape)}, expected {tuple(own.shape)}")
    own.copy_(weight)


def read_bias(module: nn.Module) -> Tensor | None:
    """The bias (out,), detached, or None."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def sampled(weight: Tensor, values: int = 64) -> Tensor:
    """Evenly spaced values of a weight, at most about twice as many as asked for, fp32."""
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // values)].to(HOST, torch.float32, copy=True)


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse NaN and infinity in a weight.

    Raises:
        NonFiniteError: naming the weight and how many of its values are bad.
    """
    if not weight.is_floating_point() or not weight.numel():
        return
    # The ends of its range: a NaN is both of them, and no copies as large as the weight are made.
    if not torch.stack(weight.detach().aminmax()).isfinite().all():
        bad = weight.numel() - int(torch.isfinite(weight.detach()).sum())
        raise NonFiniteError(
            f"weight {name!r} holds {bad} NaN or infinite values of {weight.numel()}; "
            "load the original checkpoint again"
        )


def check_finite_weights(model: nn.Module) -> None:
    """Refuse NaN and infinity in any parameter that is in memory.

    Raises:
        NonFiniteError: naming the first such weight and how many of its values are bad.
    """
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            check_finite(name, weight)


def check_model(model: nn.Module, *, elsewhere: Collection[str] = ()) -> None:
    """Refuse a model that spectrim cannot compress, before anything expensive happens.

    Args:
        model: in memory, but for some of its modules.
        elsewhere: names of modules whose weights are loaded when they are needed, and looked at
            then.

    Raises:
        ModelError: no linear layers in any block list, quantised, already compressed,
            an encoder-decoder, or weights that were never loaded.
        NonFiniteError: a weight holds NaN or infinity.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder; spectrim compresses decoder-only models")
    for name, module in model.named_modules():
        if getattr(type(module), "is_compressed_layer", False):
            raise ModelError(
                f"{kind} is already compressed: {name!r} is a {type(module).__name__}; "
                "start from the original model"
            )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{kind} is quantised or compressed ({quantization or 'hf_quantizer is set'}); "
            "start from the original 16- or 32-bit model"
        )
    absent = tuple(f"{name}." for name in elsewhere)
    for name, weight in model.named_parameters():
        if weight.is_meta and not name.startswith(absent):
            raise ModelError(f"weight {name!r} of {kind} is on the meta device: never loaded")
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    if not any(is_linear(m) for blocks in lists for block in blocks for m in block.modules()):
        raise ModelError(
            f"{kind} has no list of blocks with linear layers (nn.Linear or Conv1D); "
            "spectrim compresses the linear layers of decoder blocks"
        )
    check_finite_weights(model)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all parameters to the stored dtype, in place.

    Buffers keep theirs: files hold none of the frequencies and masks that a model computes for
    itself, and a model that is loaded computes them in fp32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

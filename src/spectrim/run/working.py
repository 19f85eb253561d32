"""Where, and in which precision, a model is worked on."""

from __future__ import annotations

from typing import Any

import torch

from spectrim.devices import HOST, accelerator, on_host
from spectrim.errors import InputError

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU.

    Raises:
        InputError: an unknown device, or one that this machine does not have; says what works.
    """
    other = accelerator()
    if str(device) == "auto":
        return HOST if other is None else other
    works = f"auto, {HOST}"
    if other is not None:
        count = torch.accelerator.device_count()
        works += "".join(f", {other.type}:{index}" for index in range(count))
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"device {str(device)!r} cannot be used here ({reason}); this machine has {works}"
        ) from error
    if place.type == "meta":
        raise InputError(f"device 'meta' holds no numbers; this machine has {works}")
    return place


def resolve_dtype(
    dtype: str | torch.dtype, stored: torch.dtype, device: torch.device
) -> torch.dtype:
    """The working dtype: on a CPU half precision is slow and coarse, so `auto` works in fp32.

    Raises:
        InputError: not a dtype that a model can work in; says which are.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in {*_DTYPES.values(), torch.float64}:
            raise InputError(f"cannot work in {dtype}; use auto, {', '.join(_DTYPES)}")
        return dtype
    if dtype == "auto":
        return torch.float32 if on_host(device) else stored
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype that a configuration says its checkpoint has."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype)
    return dtype or torch.float32

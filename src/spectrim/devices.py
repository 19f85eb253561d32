"""What devices can do, asked here and nowhere else: no other file spells a device's name.

PyTorch says through `torch.accelerator` what is there, and a device's own module (`torch.cuda`,
`torch.xpu`, ...) has what not all devices can do. A question that a device cannot answer is None.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_OLDEST_FOR_TRITON = (7, 0)

HOST = torch.device("cpu")
"""Where files are read, results are collected, and everything else lies that has to wait."""


def on_host(device: torch.device | str) -> bool:
    """Whether something on the device lies in the memory of the process."""
    return torch.device(device).type == HOST.type


def accelerator() -> torch.device | None:
    """The kind of accelerator that this machine has, None without one."""
    return torch.accelerator.current_accelerator(check_available=True)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of an accelerator, None for the host and for devices that do not tell."""
    ask = None if on_host(device) else _own(device, "mem_get_info")
    return None if ask is None else ask(device)[0]


def whole_memory(device: torch.device) -> int | None:
    """All bytes of an accelerator, None for the host and for devices that do not tell."""
    ask = None if on_host(device) else _own(device, "mem_get_info")
    return None if ask is None else ask(device)[1]


def forget_peak_memory(device: torch.device) -> None:
    """Count an accelerator's peak memory from now on."""
    forget = None if on_host(device) else _own(device, "reset_peak_memory_stats")
    if forget is not None:
        forget(device)


def peak_memory(device: torch.device) -> int | None:
    """Largest bytes held since `forget_peak_memory`, None where that is not counted."""
    ask = None if on_host(device) else _own(device, "max_memory_allocated")
    return None if ask is None else ask(device)


def wait_for(device: torch.device) -> None:
    """Wait for all work on a device: accelerators run ahead of Python."""
    wait = None if on_host(device) else _own(device, "synchronize")
    if wait is not None:
        wait()


def device_seconds(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """What a call takes an accelerator itself, in seconds, however long Python takes to ask.

    A long product goes first: while the device is at it, all calls are already waiting in line.
    """
    long = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    begin, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    for _ in range(3):
        call()
    for _ in range(8):
        long @ long
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    wait_for(device)
    return begin.elapsed_time(end) / 1000 / repeats


def name_of(device: torch.device) -> str:
    """The product, where it is known."""
    if on_host(device):
        return platform.processor() or platform.machine()
    ask = _own(device, "get_device_name")
    return device.type if ask is None else ask(device)


def has_kernel(operator: str, device: torch.device) -> bool:
    """Whether this PyTorch has an operator's kernel for a kind of device, not only its name."""
    if not hasattr(torch.ops.aten, operator):
        return False
    key = torch._C._dispatch_key_for_device(device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key)


@cache
def has_triton() -> bool:
    """Whether Triton is installed, which comes with some builds of PyTorch only."""
    return find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether Triton is here and makes kernels for a device: old cards are left out."""
    ask = None if on_host(device) else _own(device, "get_device_capability")
    found = None if ask is None else ask(device)
    return isinstance(found, tuple) and found >= _OLDEST_FOR_TRITON and has_triton()


@contextmanager
def in_tf32(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Products of fp32 matrices in TF32, where a device has it: 10 bits of a factor, fp32 sums.

    About eight times as fast, and exact for factors that were bf16 or fp16 before.
    """
    matmul = getattr(getattr(torch.backends, device.type, None), "matmul", None)
    # The first one since PyTorch 2.9, which warns of the other.
    found = [name for name in ("fp32_precision", "allow_tf32") if hasattr(matmul, name)]
    if not wanted or not found:
        yield
        return
    before = getattr(matmul, found[0])
    setattr(matmul, found[0], "tf32" if found[0] == "fp32_precision" else True)
    try:
        yield
    finally:
        setattr(matmul, found[0], before)


def keeps_own_random_state(device: torch.device) -> bool:
    """Whether random numbers drawn there come from a generator of the device."""
    return not on_host(device) and _own(device, "get_rng_state") is not None


def in_widest(x: Tensor) -> Tensor:
    """In fp64, or as it is on a device without it."""
    try:
        return x.double()
    except TypeError:  # what Metal answers
        return x


def _own(device: torch.device, name: str):
    return getattr(torch.get_device_module(device), name, None)

"""What staged forwards stand on: the gate around a target, and the thread's switches.

A greenlet shares its thread's grad mode and autocast state with everybody else on that thread.
Where a forward pauses inside `torch.no_grad()` or autocast, those switches have to be put back
for the caller, and set again when the forward goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.devices import HOST, accelerator
from spectrim.model.capture import first_tensor


def _autocast_devices() -> tuple[str, ...]:
    other = accelerator()
    return (HOST.type,) if other is None else (HOST.type, other.type)


@dataclass(frozen=True)
class Switches:
    """Grad mode and autocast of the current thread, taken by `now` and set by `restore`."""

    grad: bool
    cache: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls) -> Switches:
        """The switches as they are set."""
        autocast = tuple(
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
            for d in _autocast_devices()
        )
        return cls(torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), autocast)

    def restore(self) -> None:
        """Set the switches to what they were."""
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_cache_enabled(self.cache)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class Gate(nn.Module):
    """Stands in for a target: reports that it was reached, then calls the module it holds now.

    Attributes:
        inner: the module that is called; may be replaced while a forward waits in `arrive`.
    """

    def __init__(self, inner: nn.Module, arrive: Callable[[Tensor], None]):
        super().__init__()
        self.inner = inner
        self._arrive = arrive
        self.training = inner.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Report the input, which may pause the caller, and run the held module."""
        self._arrive(first_tensor(args, kwargs))
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Some models look at `self.fc2.weight.dtype` before they call the layer.
        if name in self._modules:
            return self._modules[name]
        return getattr(self._modules["inner"], name)

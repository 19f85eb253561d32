"""Which parameters a training moves, and in which precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def master_weights(
    parameters: list[nn.Parameter],
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Hold the parameters in fp32 (fp64 stays) and trainable; cast back to their dtypes on exit.

    bf16 parameters cannot take an Adam step of 1e-4: a weight of 0.03 would not move at all.
    Yields a context in which the parameters have the values that they will be cast to, so that
    what is judged is what is kept.
    """
    before = [(p.dtype, p.requires_grad) for p in parameters]
    for p in parameters:
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        p.requires_grad_(True)

    @contextmanager
    def as_stored() -> Iterator[None]:
        masters = [p.data for p in parameters]
        for p, (dtype, _) in zip(parameters, before, strict=True):
            p.data = p.data.to(dtype).to(p.dtype)
        try:
            yield
        finally:
            for p, master in zip(parameters, masters, strict=True):
                p.data = master

    try:
        yield as_stored
    finally:
        for p, (dtype, flag) in zip(parameters, before, strict=True):
            p.grad = None
            p.data = p.data.to(dtype)
            p.requires_grad_(flag)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for these: they are part of the forward pass, not of the training."""
    before = [(p, p.requires_grad) for p in parameters]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)

"""Gradient checkpointing for any decoder: blocks keep their input and run again in the backward.

A backward pass needs every activation of every block, or one block's at a time and a second
forward pass. The block's own `forward` is replaced, so that nothing depends on what an architecture
supports and the model may stay in evaluation mode: no dropout is switched on, gradients are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectrim.model.forward import forwards_replaced

LARGE = 1_000_000_000
"""Models with more parameters recompute their activations unless told otherwise."""


def is_large(model: nn.Module) -> bool:
    """Whether recomputing is worth a second forward pass."""
    return sum(p.numel() for p in model.parameters()) >= LARGE


@contextmanager
def recomputed(blocks: Sequence[nn.Module], *, on: bool = True) -> Iterator[None]:
    """For the time of the context these blocks recompute their activations in backward passes.

    What a block draws at random has to be the same in both runs; forward passes without gradients
    are left alone.

    Args:
        blocks: the decoder blocks.
        on: False does nothing, for callers that decide at run time.
    """
    if not on:
        yield
        return
    with forwards_replaced(blocks, lambda i: partial(_run, blocks[i].forward)):
        yield


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing draws from torch's global generators here, so their states need not be kept.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

"""One plain forward pass: evaluation mode, no cache, no gradients, everything put back after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the training flag of every single module."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Inference mode has to be off: its tensors have no version counter and never take
        # part in the training that refinement does later.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def forwards_replaced(
    blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """For the time of the context block `i` computes `make(i)(*args, **kwargs)`.

    The modules stay where they are, so attributes that the model reads from a block (its
    attention type, say) and the hooks on it keep working.
    """
    # Accelerate puts its own `forward` on the instance; that one has to come back afterwards.
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = make(index)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own


def home_device(model: nn.Module) -> torch.device:
    """The device of the embedding, where token ids enter the model."""
    return next(p.device for p in model.parameters() if not p.is_meta)


def hidden_of(output: Any) -> Any:
    """The hidden states of a block's output: the first element where it returns a tuple."""
    return output[0] if isinstance(output, tuple) else output


def run_window(model: nn.Module, input_ids: Tensor) -> Any:
    """The model's output for token ids of shape (B, T), without a cache."""
    options = {}
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        # The loss that balances experts wants all routers' outputs, those of bypassed blocks too.
        options["output_router_logits"] = False
    return model(input_ids=input_ids.to(home_device(model)), use_cache=False, **options)

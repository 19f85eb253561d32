"""Forward passes over token windows, batch by batch, in evaluation mode and without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectrim.data.windows import Windows, given_windows, longest_window
from spectrim.errors import TextError

__all__ = [
    "as_windows",
    "check_fits",
    "evaluation_mode",
    "logits_of",
    "position_chunks",
    "window_batches",
]

_CHUNK_ENTRIES = 2**24
"""fp32 logits that are worked on at a time: 64 MiB, however large the vocabulary is."""


def as_windows(windows: Windows | Tensor) -> Windows:
    """Windows as they are; the rows of a tensor (N, T) become windows."""
    return given_windows(windows) if isinstance(windows, Tensor) else windows


def check_fits(model: Any, windows: Windows) -> None:
    """Raise `TextError` if the model has no embedding or no position for some token."""
    windows.check_vocabulary(model.get_input_embeddings().weight.shape[0])
    longest = longest_window(model.config)
    if longest is not None and windows.length > longest:
        raise TextError(
            f"windows of {windows.length} tokens are longer than the model's {longest} positions; "
            "make shorter windows"
        )


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Put models into evaluation mode and restore each one's mode afterwards."""
    before = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def window_batches(windows: Windows, batch: int) -> Iterator[tuple[int, Tensor]]:
    """Index of the first window and ids (at most `batch`, T), in order."""
    if batch < 1:
        raise TextError(f"a batch of {batch} windows is not possible; give at least 1")
    for start in range(0, len(windows), batch):
        yield start, windows.ids[start : start + batch]


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, device: torch.device | str | None) -> Tensor:
    """Logits (windows, T, vocabulary) in the model's dtype on the model's device.

    `device` is where the ids go, None for wherever the model's embeddings are.
    """
    target = model.get_input_embeddings().weight.device if device is None else device
    return model(input_ids=ids.to(target), use_cache=False).logits


def position_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the position axis that keep an fp32 copy of the logits small.

    Log-softmax needs fp32 whatever the model's dtype; a whole fp32 copy of long windows over a
    large vocabulary would take several times the memory of the model.
    """
    count, length, vocabulary = logits.shape
    step = max(1, _CHUNK_ENTRIES // (count * vocabulary))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))

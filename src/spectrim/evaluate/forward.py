"""Forward passes over token windows, batch by batch, in evaluation mode and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectrim.data.windows import Windows, given_windows, longest_window
from spectrim.errors import TextError
from spectrim.model.tail import LOGITS_AT_ONCE, PROBED_TOKENS, Tail, blocks_in_sequence

WHOLE_LOGITS = 8 * LOGITS_AT_ONCE
"""A batch with fewer logits gives them at once."""


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


class Predictions:
    """A model's logits for windows, a few tokens at a time, however large the vocabulary is.

    Args:
        model: in evaluation mode.
        windows: what will be predicted.
        batch: windows per forward pass.
        device: where the ids go, None for wherever the model's embeddings are.
    """

    def __init__(self, model: Any, windows: Windows, batch: int, device: torch.device | str | None):
        embeddings = model.get_input_embeddings().weight
        self._model, self._tail = model, None
        self._device = embeddings.device if device is None else device
        if batch * windows.length * embeddings.shape[0] > WHOLE_LOGITS:
            probe = windows.ids[:1, :PROBED_TOKENS].to(self._device)
            names = blocks_in_sequence(model, probe)
            tail = Tail.find(model, names, probe) if names else None
            # A model whose head works otherwise gives all logits of a batch at once.
            self._tail = tail if tail is not None and tail.by_token else None

    @torch.no_grad()
    def of(self, ids: Tensor) -> Callable[[slice, slice], Tensor]:
        """A batch (B, T), read; windows and positions -> logits (b, t, vocabulary) of that part.

        They are in the model's dtype and on its device.
        """
        ids = ids.to(self._device)
        tail = self._tail
        if tail is None:
            logits = self._model(input_ids=ids, use_cache=False).logits
            return lambda rows, positions: logits[rows, positions]
        hidden = tail.states(ids)
        return torch.no_grad()(lambda rows, positions: tail.logits(hidden[rows, positions]))

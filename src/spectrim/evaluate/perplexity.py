"""Perplexity, `exp(Σ nll / Σ tokens)`, with its protocol and its uncertainty.

The first token of every window is context only, so a window of T tokens predicts T - 1. Log-softmax
is taken in fp32 whatever the model's dtype and sums are taken in fp64. A value that is not finite
is an error, never skipped: the common harness drops such batches and reports the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.data.windows import Windows
from spectrim.errors import NonFiniteError
from spectrim.evaluate.forward import (
    Predictions,
    as_windows,
    check_fits,
    evaluation_mode,
    window_batches,
)
from spectrim.model.losses import token_losses
from spectrim.model.tail import pieces

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True, eq=False)
class Perplexity:
    """The result of one measurement.

    Attributes:
        nll: mean negative log-likelihood, nats per predicted token.
        tokens: number of predicted tokens.
        perplexity: `exp(nll)`.
        per_window_nll: mean nats per predicted token of each window, (N,) fp64.
        protocol: sources, hashes, window length and count, BOS policy, dtype; JSON-ready.
    """

    nll: float
    tokens: int
    perplexity: float
    per_window_nll: Tensor
    protocol: dict[str, Any]

    @property
    def nll_standard_error(self) -> float:
        """Standard error of `nll` over windows, nats per token; NaN for a single window."""
        if len(self.per_window_nll) < 2:
            return math.nan
        return float(self.per_window_nll.std() / math.sqrt(len(self.per_window_nll)))

    @property
    def standard_error(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_standard_error

    def record(self) -> dict[str, Any]:
        """JSON-ready summary without the single windows; None where nothing can be said."""
        error = self.standard_error
        return {
            "perplexity": self.perplexity,
            "standard_error": None if math.isnan(error) else error,
            "nll": self.nll,
            "tokens": self.tokens,
            "protocol": self.protocol,
        }


def perplexity(
    model: Any,
    windows: Windows | Tensor,
    *,
    batch: int = 8,
    device: torch.device | str | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal language model on token windows.

    Args:
        model: a Hugging Face causal language model; its mode is restored afterwards.
        windows: windows, or a tensor (N, T) whose rows are the windows.
        batch: windows per forward pass; changes speed and memory, not the result.
        device: where the ids go, None for the device of the model's embeddings.

    Raises:
        NonFiniteError: a loss that is NaN or infinite; names window, position and source.
        TextError: token ids or window lengths that the model does not have.
    """
    windows = as_windows(windows)
    check_fits(model, windows)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    sums = []
    with evaluation_mode(model):
        predictions = Predictions(model, windows, batch, device)
        for start, ids in window_batches(windows, batch):
            losses = _token_losses(predictions.of(ids), ids, vocabulary)  # (batch, T-1)
            _check_finite(losses, windows, start)
            sums.append(losses.sum(1))
    per_window = torch.cat(sums)
    predicted = windows.length - 1
    tokens = len(windows) * predicted
    nll = float(per_window.sum() / tokens)
    if nll > _LARGEST_EXPONENT:
        raise NonFiniteError(
            f"the loss is {nll:.1f} nats per token, whose exponential exceeds fp64; the model is "
            "broken: check its weights"
        )
    return Perplexity(
        nll=nll,
        tokens=tokens,
        perplexity=math.exp(nll),
        per_window_nll=per_window / predicted,
        protocol={**windows.record(), "dtype": str(model.dtype).removeprefix("torch.")},
    )


def _token_losses(logits: Callable[[slice, slice], Tensor], ids: Tensor, vocabulary: int) -> Tensor:
    """Nats per predicted token, (windows, T-1) fp64 on the CPU."""
    targets = ids[:, 1:]  # the last position predicts a token that is not in the window
    losses = torch.empty(targets.shape, dtype=torch.float64)
    for rows, positions in pieces(targets.shape[0], targets.shape[1], vocabulary):
        part = token_losses(logits(rows, positions), targets[rows, positions])
        losses[rows, positions] = part.cpu().double()
    return losses


def _check_finite(losses: Tensor, windows: Windows, start: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if not len(bad):
        return
    row, position = (int(i) for i in bad[0])
    window = start + row
    source = windows.sources[int(windows.source_index[window])]
    raise NonFiniteError(
        f"the loss of window {window} of {len(windows)} (source {source!r}, first token at "
        f"{int(windows.starts[window])}) is {float(losses[row, position])} at position "
        f"{position + 1}; {len(bad)} such values in this batch: check the model's weights, "
        "or load it in float32 or bfloat16 instead of float16"
    )

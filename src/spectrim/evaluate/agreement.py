"""How far a compressed model's predictions are from the dense model's, token by token.

Two measures that need no reference text to be right: the Kullback-Leibler divergence
`KL(dense || compressed)` of the next-token distributions, and how often the most likely token is
the same. Both are kept per position, since errors of early positions feed the later ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.data.windows import Windows
from spectrim.errors import ModelError, NonFiniteError
from spectrim.evaluate.forward import (
    Predictions,
    as_windows,
    check_fits,
    evaluation_mode,
    window_batches,
)
from spectrim.evaluate.routing import is_mixture, routing_agreement
from spectrim.model.pinning import Pins
from spectrim.model.tail import pieces


@dataclass(frozen=True, eq=False)
class Agreement:
    """Agreement of two models on the same windows; every position of a window counts.

    Attributes:
        kl: mean `KL(dense || compressed)`, nats per token.
        top1: share of positions where both models prefer the same token.
        kl_by_position: mean over windows, (T,) fp64.
        top1_by_position: share of windows, (T,) fp64.
        kl_by_window: mean over positions, (N,) fp64.
        top1_by_window: share of positions, (N,) fp64.
        routing: share of tokens that every router sends to the same experts, by router in
            execution order; empty for a model without experts.
        protocol: sources, hashes, window length and count, BOS policy, dtypes; JSON-ready.
    """

    kl: float
    top1: float
    kl_by_position: Tensor
    top1_by_position: Tensor
    kl_by_window: Tensor
    top1_by_window: Tensor
    protocol: dict[str, Any]
    routing: tuple[float, ...] = ()

    @property
    def kl_standard_error(self) -> float:
        """Standard error of `kl` over windows; NaN for a single window."""
        return _standard_error(self.kl_by_window)

    @property
    def top1_standard_error(self) -> float:
        """Standard error of `top1` over windows; NaN for a single window."""
        return _standard_error(self.top1_by_window)

    def by_depth(self, bins: int = 8) -> list[dict[str, float]]:
        """Means over at most `bins` consecutive stretches of positions, ends exclusive."""
        length = len(self.kl_by_position)
        edges = [round(i * length / bins) for i in range(bins + 1)]
        return [
            {
                "from": first,
                "to": last,
                "kl": float(self.kl_by_position[first:last].mean()),
                "top1": float(self.top1_by_position[first:last].mean()),
            }
            for first, last in pairwise(edges)
            if last > first
        ]

    def record(self) -> dict[str, Any]:
        """JSON-ready summary with the growth along the window; None for unknown errors."""
        errors = (self.kl_standard_error, self.top1_standard_error)
        kl_error, top1_error = (None if math.isnan(e) else e for e in errors)
        return {
            "kl": self.kl,
            "kl_standard_error": kl_error,
            "top1": self.top1,
            "top1_standard_error": top1_error,
            "by_position": self.by_depth(),
            "protocol": self.protocol,
            **({"routing": self._routing()} if self.routing else {}),
        }

    def _routing(self) -> dict[str, Any]:
        shares = list(self.routing)
        return {"mean": sum(shares) / len(shares), "least": min(shares), "by_router": shares}


def agreement(
    dense: Any,
    compressed: Any,
    windows: Windows | Tensor,
    *,
    batch: int = 8,
    device: torch.device | str | None = None,
) -> Agreement:
    """Compare the next-token distributions of two models that share a vocabulary.

    Args:
        dense: the reference model.
        compressed: the model that stands in for it; may lie on another device.
        windows: windows, or a tensor (N, T) whose rows are the windows.
        batch: windows per forward pass.
        device: where the ids go, None for each model's own device.

    Raises:
        ModelError: the vocabularies differ in size.
        NonFiniteError: a divergence that is NaN or infinite; names window and position.
        TextError: token ids or window lengths that a model does not have.
    """
    windows = as_windows(windows)
    for model in (dense, compressed):
        check_fits(model, windows)
    vocabulary = max(m.get_input_embeddings().weight.shape[0] for m in (dense, compressed))
    divergences, matches, routing = [], [], []
    routed = is_mixture(dense)
    with evaluation_mode(dense, compressed):
        expected = Predictions(dense, windows, batch, device)
        found = Predictions(compressed, windows, batch, device)
        for start, ids in window_batches(windows, batch):
            reference, chosen = _predicted(expected, ids, routed)
            candidate, others = _predicted(found, ids, routed)
            kl, match = _compare(reference, candidate, ids, vocabulary)
            _check_finite(kl, windows, start)
            routing.append([len(ids) * share for share in routing_agreement(chosen, others)])
            divergences.append(kl)
            matches.append(match)
    kl, match = torch.cat(divergences), torch.cat(matches)  # (N, T)
    return Agreement(
        kl=float(kl.mean()),
        top1=float(match.mean()),
        kl_by_position=kl.mean(0),
        top1_by_position=match.mean(0),
        kl_by_window=kl.mean(1),
        top1_by_window=match.mean(1),
        routing=tuple(sum(shares) / len(kl) for shares in zip(*routing, strict=True)),
        protocol={
            **windows.record(),
            "dtype": str(compressed.dtype).removeprefix("torch."),
            "dense_dtype": str(dense.dtype).removeprefix("torch."),
        },
    )


def _predicted(
    predictions: Predictions, ids: Tensor, routed: bool
) -> tuple[Callable[[slice, slice], Tensor], list[Tensor]]:
    """Logits by piece, and what routers chose where there are any."""
    if not routed:
        return predictions.of(ids), []
    pins = Pins()
    with pins.writing():
        return predictions.of(ids), pins.choices


def _compare(
    reference: Callable[[slice, slice], Tensor],
    candidate: Callable[[slice, slice], Tensor],
    ids: Tensor,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Divergence in nats and agreement (0 or 1) per position, both (windows, T) fp64, CPU."""
    kls, matches = torch.empty(2, *ids.shape, dtype=torch.float64)
    for part in pieces(ids.shape[0], ids.shape[1], vocabulary):
        p = reference(*part).float()
        q = candidate(*part).to(p)
        if p.shape != q.shape:
            raise ModelError(
                f"the dense model predicts {p.shape[-1]} tokens, the compressed one "
                f"{q.shape[-1]}; compare models of one vocabulary"
            )
        log_p, log_q = F.log_softmax(p, -1), F.log_softmax(q, -1)
        # Zero probability contributes zero, also where a model masks a token with -inf.
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        kls[part] = terms.sum(-1).cpu().double()
        matches[part] = (p.argmax(-1) == q.argmax(-1)).cpu().double()
    return kls, matches


def _check_finite(kl: Tensor, windows: Windows, start: int) -> None:
    bad = (~kl.isfinite()).nonzero()
    if len(bad):
        row, position = (int(i) for i in bad[0])
        raise NonFiniteError(
            f"the divergence of window {start + row} of {len(windows)} is "
            f"{float(kl[row, position])} at position {position}; {len(bad)} such values in this "
            "batch: check the weights of both models"
        )


def _standard_error(values: Tensor) -> float:
    return math.nan if len(values) < 2 else float(values.std() / math.sqrt(len(values)))

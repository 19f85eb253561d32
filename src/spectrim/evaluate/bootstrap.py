"""How certain a difference of two perplexities is: the paired bootstrap over windows.

Both models are measured on the same windows, so whole windows are drawn with replacement and the
difference of the two means is taken on each draw: what makes a window hard for both cancels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import InputError
from spectrim.evaluate.perplexity import Perplexity

_DRAWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Difference:
    """A paired comparison of a model with a reference on the same windows.

    Attributes:
        nll: model minus reference, nats per token; above 0 the model is worse.
        nll_low: lower end of the interval of `nll`.
        nll_high: upper end.
        nll_standard_error: of `nll`.
        perplexity: difference of the two perplexities.
        perplexity_low: lower end of its interval.
        perplexity_high: upper end.
        confidence: coverage of both intervals.
        resamples: number of bootstrap draws.
    """

    nll: float
    nll_low: float
    nll_high: float
    nll_standard_error: float
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    confidence: float
    resamples: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval of the difference contains zero."""
        return self.nll_low <= 0.0 <= self.nll_high

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "within_noise": self.within_noise}


def perplexity_difference(
    model: Perplexity,
    reference: Perplexity,
    *,
    generator: torch.Generator,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Difference:
    """Percentile intervals of the difference of two measurements on the same windows.

    Args:
        model: the measurement of interest.
        reference: what it is compared with, e.g. the dense model.
        generator: source of the draws, on the CPU.
        resamples: bootstrap draws.
        confidence: coverage in (0, 1).

    Raises:
        InputError: the windows differ, or are too few to draw from.
    """
    ours, theirs = model.per_window_nll, reference.per_window_nll
    _check_pairs(model, reference)
    if not 0 < confidence < 1 or resamples < 1:
        raise InputError(
            f"confidence must be in (0, 1) and resamples at least 1; found {confidence} and "
            f"{resamples}"
        )
    drawn_ours, drawn_theirs = _resampled_means(torch.stack([ours, theirs]), resamples, generator)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    nll = torch.quantile(drawn_ours - drawn_theirs, tails)
    perplexities = torch.quantile(drawn_ours.exp() - drawn_theirs.exp(), tails)
    paired = ours - theirs
    return Difference(
        nll=model.nll - reference.nll,
        nll_low=float(nll[0]),
        nll_high=float(nll[1]),
        nll_standard_error=float(paired.std() / math.sqrt(len(paired))),
        perplexity=model.perplexity - reference.perplexity,
        perplexity_low=float(perplexities[0]),
        perplexity_high=float(perplexities[1]),
        confidence=confidence,
        resamples=resamples,
    )


def _resampled_means(values: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Means of `values` (kinds, N) over draws of N windows: (kinds, resamples)."""
    count = values.shape[1]
    means = []
    for start in range(0, resamples, _DRAWS_AT_A_TIME):
        draws = min(_DRAWS_AT_A_TIME, resamples - start)
        picked = torch.randint(0, count, (draws, count), generator=generator)
        means.append(values[:, picked].mean(-1))  # (kinds, draws)
    return torch.cat(means, dim=1)


def _check_pairs(model: Perplexity, reference: Perplexity) -> None:
    keys = [p.protocol.get("fingerprint") for p in (model, reference)]
    if keys[0] != keys[1]:
        raise InputError(
            f"the two perplexities were measured on different windows ({str(keys[0])[:12]} and "
            f"{str(keys[1])[:12]}); measure both with the same text, lengths and BOS policy"
        )
    if len(model.per_window_nll) < 2:
        raise InputError("a paired bootstrap needs at least 2 windows, found 1; use more text")

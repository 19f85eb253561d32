"""Notes on calibration that says too little: few tokens, repeated text, windows too long."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spectrim.data.windows import Windows
from spectrim.model.anatomy import Anatomy

SEQUENCE = 8
"""Text counts as new where so many tokens in a row have not been seen before."""

DISTINCT = 0.75
"""Least share of new text that is not worth a note; books and web pages have more than 0.9."""


def thin_notes(windows: Windows, anatomy: Anatomy, longest: int | None) -> Iterator[str]:
    """What a reader of the report has to know of the calibration windows.

    Args:
        windows: of all processes.
        anatomy: the targets, whose channels need tokens.
        longest: positions that the model has, None where it does not say.
    """
    count, length = windows.ids.shape
    tokens, share = count * length, distinct_share(windows.ids)
    if share < DISTINCT:
        yield (
            f"only {share:.0%} of the {tokens} calibration tokens are new text, the rest repeats "
            f"sequences of {min(SEQUENCE, length)} tokens: the windows are equal or overlap, or "
            "their text is short; give more text"
        )
    new = round(share * tokens) if share < DISTINCT else tokens
    thin = [t for t in anatomy.targets if t.in_features > new]
    if thin:
        widest = max(thin, key=lambda t: t.in_features)
        yield (
            f"{new} calibration tokens are fewer than the input channels of {len(thin)} of "
            f"{len(anatomy.targets)} targets ({widest.in_features} in {widest.name}): what the "
            "tokens do not say of them is taken from the weights; use more or longer windows"
        )
    counts = torch.bincount(windows.source_index, minlength=len(windows.sources)).tolist()
    for name, held, number in zip(windows.sources, windows.text_tokens, counts, strict=True):
        if 0 < held < number * length:
            yield (
                f"the text {name!r} has {held} tokens, fewer than the {number} windows of "
                f"{length} that were asked of it: they overlap"
            )
    if longest is not None and length > longest:
        yield (
            f"calibration windows of {length} tokens are longer than the model's {longest} "
            "positions: what it computes beyond them says little; cut the windows"
        )


def distinct_share(ids: torch.Tensor) -> float:
    """Share of the sequences of `SEQUENCE` tokens in windows (N, T) that are new."""
    keys = _sequences(ids)
    return len(keys.unique()) / len(keys)


def seen_notes(held: torch.Tensor, trained: torch.Tensor) -> list[str]:
    """What has to be said where held-out windows (N, T) are not apart from those (M, T) trained on.

    A training is judged by them, and by text that it learns by heart it looks like a success.
    """
    if not len(held):
        return []
    seen = float(torch.isin(_sequences(held), _sequences(trained)).double().mean())
    if seen < 1 - DISTINCT:
        return []
    return [
        f"{seen:.0%} of the held-out text stands in the windows that were trained on as well, so "
        "its loss is of text that was learned: give more text or fewer windows, and measure on "
        "another text"
    ]


def _sequences(ids: torch.Tensor) -> torch.Tensor:
    """A key, int64, of every sequence of `SEQUENCE` tokens inside windows (N, T)."""
    sequences = ids.unfold(1, min(SEQUENCE, ids.shape[1]), 1).flatten(0, 1)
    # A polynomial of the tokens modulo 2^64: equal sequences have equal keys, others hardly ever.
    keys = torch.zeros(len(sequences), dtype=torch.int64)
    for column in sequences.cpu().unbind(1):
        keys = keys * 6364136223846793005 + column + 1442695040888963407
    return keys

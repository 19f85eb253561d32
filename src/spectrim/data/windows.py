"""Windows cut from texts: at random positions for calibration, one after the other to evaluate.

Calibration draws start positions from the uniform distribution, evaluation walks the text from its
beginning without overlap. BOS, where asked for, replaces the first token of a window, so that every
policy predicts the same positions of the same text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from spectrim.data.text import Text
from spectrim.data.tokens import tokenize, tokenizer_hash
from spectrim.data.window_record import Windows, given_windows, longest_window
from spectrim.errors import TextError

logger = logging.getLogger(__name__)

MOST_SPARE = 64
"""Windows beside the calibration that are kept to measure on."""

BosPolicy = Literal["none", "each", "half"]
EvaluationBos = Literal["none", "each", "start"]


def calibration_windows(
    text: Text | Sequence[Text] | Tensor,
    tokenizer: Any = None,
    *,
    windows: int,
    window_length: int,
    seed: int = 0,
    bos: BosPolicy = "none",
    shortest: int | None = None,
    shares: Sequence[float] | None = None,
) -> Windows:
    """Windows at random positions of one or several texts.

    Args:
        text: one text, or several, which share the windows and alternate; or a tensor (N, T)
            whose rows are the windows, with which the other arguments play no part.
        tokenizer: a Hugging Face tokenizer; may be None with a tensor.
        windows: how many, N.
        window_length: tokens per window, T.
        seed: of the generator behind the start positions.
        bos: which windows have their first token replaced by BOS.
        shortest: where a text has too few tokens for one window, all windows are shortened to
            what it allows, but not below this; None refuses.
        shares: of the windows that each text gives, relative to their sum; None for equal ones.

    Raises:
        TextError: too little text, no BOS token where one is asked for, or a malformed tensor.
    """
    if isinstance(text, Tensor):
        return given_windows(text, tokenizer=tokenizer)
    texts = (text,) if isinstance(text, Text) else tuple(text)
    counts = share_out(windows, shares or [1.0] * len(texts))
    if not texts or min(counts) < 1:
        raise TextError(f"{len(texts)} texts cannot share {windows} windows so that each has one")
    _check_length(window_length)
    tokenized = [tokenize(source.content, tokenizer) for source in texts]
    if shortest is not None:
        fits = min(map(len, tokenized)) - 2
        window_length = max(min(window_length, fits), min(window_length, shortest))
    how = {"length": window_length, "generator": torch.Generator().manual_seed(seed)}
    drawn = [
        _drawn(source.name, tokens, count=count, **how)
        for source, tokens, count in zip(texts, tokenized, counts, strict=True)
    ]
    facts: dict[str, Any] = {
        **{"sources": tuple(t.name for t in texts), "seed": seed, "bos": bos},
        "text_sha256": tuple(t.sha256 for t in texts),
        "text_tokens": tuple(d.total for d in drawn),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }

    def together(rows: list[tuple[Tensor, Tensor]], spare: Windows | None) -> Windows:
        """One set of windows from (starts, tokens) of every text."""
        order, owner = _alternating([len(starts) for starts, _ in rows])
        ids = torch.cat([_with_bos(ids, tokenizer, bos) for _, ids in rows])[order]
        return Windows(ids, torch.cat([s for s, _ in rows])[order], owner, **facts, spare=spare)

    left = [d.spare for d in drawn]
    spare = together(left, None) if any(len(starts) for starts, _ in left) else None
    return together([d.rows for d in drawn], spare)


def _alternating(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The order of windows that lie text by text, and which text each is from then.

    By the position within a text, spread over [0, 1): texts alternate in proportion, so that a
    prefix of the windows is a fair sample too.
    """
    place = torch.cat([(torch.arange(count) + 0.5) / max(1, count) for count in counts])
    owner = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    order = torch.argsort(place, stable=True)
    return order, owner[order]


def share_out(count: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers with the sum `count`, in proportion to the shares, by largest remainders."""
    total = math.fsum(shares)
    exact = [count * share / total for share in shares]
    whole = [math.floor(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: count - sum(whole)]:
        whole[i] += 1
    return whole


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What one text gives: (starts, ids) of its windows and of some that overlap none of them."""

    rows: tuple[Tensor, Tensor]
    spare: tuple[Tensor, Tensor]
    total: int


def _drawn(
    name: str, tokens: Tensor, *, count: int, length: int, generator: torch.Generator
) -> _Drawn:
    needed = length + 2
    if len(tokens) < needed:
        raise TextError(
            f"the text {name!r} has {len(tokens)} tokens; windows of {length} "
            f"need at least {needed}: give a longer text or shorter windows"
        )
    if len(tokens) < count * length:
        logger.warning(
            "the text %r has %d tokens; %d windows of %d overlap in it",
            *(name, len(tokens), count, length),
        )
    starts = torch.randint(0, len(tokens) - (length + 1), (count,), generator=generator)
    free = _untouched(starts, length, len(tokens))
    return _Drawn(
        (starts, _rows(tokens, starts, length)), (free, _rows(tokens, free, length)), len(tokens)
    )


def _untouched(starts: Tensor, length: int, total: int) -> Tensor:
    """Starts of at most `MOST_SPARE` windows that overlap neither each other nor the given ones."""
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), starts.sort().values + length])
    nexts = torch.cat([starts.sort().values, torch.tensor([total])])
    found = [
        torch.arange(int(end), int(following) - length + 1, length)
        for end, following in zip(ends.cummax(0).values, nexts, strict=True)
        if following - end >= length
    ]
    free = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
    if len(free) <= MOST_SPARE:
        return free
    return free[torch.linspace(0, len(free) - 1, MOST_SPARE).round().long()]


def evaluation_windows(
    text: Text,
    tokenizer: Any,
    *,
    window_length: int | Literal["max"] = 2048,
    max_tokens: int | None = None,
    bos: EvaluationBos = "none",
    shortest: int | None = None,
    config: Any = None,
) -> Windows:
    """Non-overlapping windows from the beginning of a text; an incomplete last one is dropped.

    Args:
        text: what to measure on.
        tokenizer: a Hugging Face tokenizer.
        window_length: tokens per window, T; 2048 is the literature's, `max` the model's longest.
        max_tokens: read at most this many tokens of the text.
        bos: `none`; `each` replaces the first token of every window; `start` puts one BOS before
            the text, as SVD-LLM's harness (arXiv 2403.07378) does.
        shortest: a text too short for one window gives one of all its tokens, if it has as many
            as this; None refuses.
        config: the model's configuration: resolves `max` and refuses longer windows.

    Raises:
        TextError: too little text for one window, a window longer than the model's, no BOS token.
    """
    length = _resolve_length(window_length, config)
    tokens = tokenize(text.content, tokenizer)
    total = len(tokens)
    tokens = tokens[:max_tokens]
    if bos == "start":
        tokens = torch.cat([torch.tensor([_bos_id(tokenizer)]), tokens])
    if shortest is not None and min(shortest, length) <= len(tokens) < length:
        logger.warning(
            "the text %r has %d tokens, less than one window of %d: measured on one window of all",
            *(text.name, len(tokens), length),
        )
        length = len(tokens)
    count = len(tokens) // length
    if count == 0:
        raise TextError(
            f"the text {text.name!r} has {len(tokens)} tokens to read; one window of {length} "
            f"needs {length}: give a longer text or shorter windows"
        )
    ids = tokens[: count * length].reshape(count, length)  # (N, T)
    return Windows(
        ids=ids if bos == "start" else _with_bos(ids, tokenizer, bos),
        starts=torch.arange(count) * length - int(bos == "start"),
        source_index=torch.zeros(count, dtype=torch.int64),
        sources=(text.name,),
        text_sha256=(text.sha256,),
        text_tokens=(total,),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        seed=None,
        bos=bos,
    )


def _resolve_length(window_length: int | Literal["max"], config: Any) -> int:
    longest = None if config is None else longest_window(config)
    if window_length == "max":
        if longest is None:
            raise TextError(
                "window_length 'max' needs a model configuration with max_position_embeddings; "
                "give the length as a number of tokens"
            )
        return longest
    _check_length(window_length)
    if longest is not None and window_length > longest:
        raise TextError(
            f"a window of {window_length} tokens is longer than the model's {longest} positions; "
            f"ask for at most {longest}, or 'max'"
        )
    return window_length


def _check_length(window_length: int) -> None:
    if window_length < 2:
        raise TextError(f"a window of {window_length} tokens predicts nothing; give at least 2")


def _rows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    return tokens[starts[:, None] + torch.arange(length)]  # (N, T)


def _with_bos(ids: Tensor, tokenizer: Any, bos: str) -> Tensor:
    if bos == "none":
        return ids
    step = {"each": 1, "half": 2}.get(bos)
    if step is None:
        raise TextError(f"unknown BOS policy {bos!r}; use none, each or half")
    ids = ids.clone()
    ids[::step, 0] = _bos_id(tokenizer)
    return ids


def _bos_id(tokenizer: Any) -> int:
    found = getattr(tokenizer, "bos_token_id", None)
    if found is None:
        raise TextError(
            f"the tokenizer {type(tokenizer).__name__} has no BOS token; use bos='none'"
        )
    return int(found)

"""Windows cut from texts: at random positions for calibration, one after the other to evaluate.

Calibration draws start positions from the uniform distribution, evaluation walks the text from its
beginning without overlap. BOS, where asked for, replaces the first token of a window, so that every
policy predicts the same positions of the same text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spectrim.data.text import Text
from spectrim.data.tokens import tokenize, tokenizer_hash
from spectrim.data.window_record import Windows, given_windows, longest_window
from spectrim.errors import TextError

__all__ = [
    "BosPolicy",
    "EvaluationBos",
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "given_windows",
    "longest_window",
]

logger = logging.getLogger(__name__)

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
) -> Windows:
    """Windows at random positions of one or several texts.

    Args:
        text: one text, or several, which share the windows equally and alternate; or a tensor
            (N, T) whose rows are the windows, with which the other arguments play no part.
        tokenizer: a Hugging Face tokenizer; may be None with a tensor.
        windows: how many, N.
        window_length: tokens per window, T.
        seed: of the generator behind the start positions.
        bos: which windows have their first token replaced by BOS.
        shortest: where a text has too few tokens for one window, all windows are shortened to
            what it allows, but not below this; None refuses.

    Raises:
        TextError: too little text, no BOS token where one is asked for, or a malformed tensor.
    """
    if isinstance(text, Tensor):
        return given_windows(text, tokenizer=tokenizer)
    texts = (text,) if isinstance(text, Text) else tuple(text)
    if not 1 <= len(texts) <= windows:
        raise TextError(f"{len(texts)} texts cannot share {windows} windows; give 1 to {windows}")
    _check_length(window_length)
    tokenized = [tokenize(source.content, tokenizer) for source in texts]
    if shortest is not None:
        fits = min(len(tokens) for tokens in tokenized) - 2
        window_length = max(min(window_length, fits), min(window_length, shortest))
    generator = torch.Generator().manual_seed(seed)
    ids, starts, totals = [], [], []
    for index, (source, tokens) in enumerate(zip(texts, tokenized, strict=True)):
        count = windows // len(texts) + (index < windows % len(texts))
        needed = window_length + 2
        if len(tokens) < needed:
            raise TextError(
                f"the text {source.name!r} has {len(tokens)} tokens; windows of {window_length} "
                f"need at least {needed}: give a longer text or shorter windows"
            )
        if len(tokens) < count * window_length:
            logger.warning(
                "the text %r has %d tokens; %d windows of %d overlap in it",
                *(source.name, len(tokens), count, window_length),
            )
        start = torch.randint(0, len(tokens) - (window_length + 1), (count,), generator=generator)
        ids.append(_with_bos(_rows(tokens, start, window_length), tokenizer, bos))
        starts.append(start)
        totals.append(len(tokens))
    # Row r of every source before row r+1 of any: a prefix of the windows is a fair sample too.
    turn = torch.cat([torch.arange(len(s)) for s in starts])
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(starts)])
    order = torch.argsort(turn * len(texts) + owner)
    return Windows(
        ids=torch.cat(ids)[order],
        starts=torch.cat(starts)[order],
        source_index=owner[order],
        sources=tuple(t.name for t in texts),
        text_sha256=tuple(t.sha256 for t in texts),
        text_tokens=tuple(totals),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        seed=seed,
        bos=bos,
    )


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

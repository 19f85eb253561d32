"""From text to token ids, and the identity of the tokenizer that made them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

PART_CHARACTERS = 1_000_000
"""Texts are tokenised in parts of this many characters, so that memory stays bounded."""

_PROBE = "The 3 quick brown foxes — naïve façade,\n\n\tcafé №7 日本 🙂 aren't 1,024.5% done."


def tokenize(content: str, tokenizer: Any) -> Tensor:
    """Token ids of a text without special tokens, (tokens,) int64.

    Parts of `PART_CHARACTERS` characters are tokenised one by one and joined; a word that a part
    boundary cuts is tokenised as two. The cut is part of the protocol and must not change.
    """
    parts = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(content), PART_CHARACTERS):
        # verbose=False: a text is longer than the model's window by design.
        encoded = tokenizer(
            content[start : start + PART_CHARACTERS],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        parts.append(torch.tensor(encoded["input_ids"], dtype=torch.int64))
    return torch.cat(parts)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how the tokenizer maps text to ids.

    Fast tokenizers are hashed by their own serialisation, without the padding and truncation that
    earlier calls leave in it. Others are hashed by class, vocabulary, special tokens and the ids
    of one probing sentence, which shows differing merges.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        state = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "probe": [int(i) for i in probe],
        }
    state["bos"] = getattr(tokenizer, "bos_token_id", None)
    canonical = json.dumps(state, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()

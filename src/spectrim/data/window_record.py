"""Windows of token ids, with everything that is needed to make the same ones again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectrim.data.tokens import tokenizer_hash
from spectrim.devices import HOST
from spectrim.errors import TextError


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and where they came from.

    Attributes:
        ids: token ids, (N, T) int64.
        starts: index of each window's first token in its tokenised text, (N,) int64; -1 where the
            window was given or sampled.
        source_index: which of `sources` each window is from, (N,) int64.
        sources: names of the texts.
        text_sha256: their hashes, in the same order.
        text_tokens: how many tokens each text has.
        tokenizer_sha256: hash of the tokenizer, empty when unknown.
        seed: of the start positions, None where nothing was drawn.
        bos: `none`, `each`, `half` (every second window), or `start` (once, before the text).
        spare: some windows of the same texts that overlap none of these, to measure on; None where
            nothing is left. They are not part of the record.
    """

    ids: Tensor
    starts: Tensor
    source_index: Tensor
    sources: tuple[str, ...]
    text_sha256: tuple[str, ...]
    text_tokens: tuple[int, ...]
    tokenizer_sha256: str
    seed: int | None
    bos: str
    spare: Windows | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens per window, T."""
        return self.ids.shape[1]

    def record(self) -> dict[str, Any]:
        """The protocol as JSON-ready values, for reports and results."""
        return {
            "sources": list(self.sources),
            "text_sha256": list(self.text_sha256),
            "text_tokens": list(self.text_tokens),
            "tokenizer_sha256": self.tokenizer_sha256,
            "windows": len(self),
            "window_length": self.length,
            "seed": self.seed,
            "bos": self.bos,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """SHA-256 of the ids, their origin and the tokenizer: the key of every cache.

        Names are left out, so that renaming a file does not invalidate anything.
        """
        origin = {
            "shape": list(self.ids.shape),
            "starts": self.starts.tolist(),
            "source_index": self.source_index.tolist(),
            "text_sha256": list(self.text_sha256),
            "tokenizer_sha256": self.tokenizer_sha256,
            "seed": self.seed,
            "bos": self.bos,
        }
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
        digest.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def take(self, count: int) -> Windows:
        """The first `count` windows; several sources alternate, so each keeps its share."""
        if not 1 <= count <= len(self):
            raise TextError(f"asked for {count} windows of {len(self)}; ask for 1 to {len(self)}")
        return self.pick(torch.arange(count))

    def pick(self, rows: Tensor) -> Windows:
        """The windows of these indices, int64."""
        return replace(
            self,
            ids=self.ids[rows],
            starts=self.starts[rows],
            source_index=self.source_index[rows],
        )

    def check_vocabulary(self, size: int) -> None:
        """Raise `TextError` if an id does not exist in a model with `size` embeddings."""
        largest = int(self.ids.max())
        if largest >= size:
            raise TextError(
                f"the windows hold the token id {largest}, but the model has {size} embeddings; "
                "use the model's own tokenizer"
            )


def given_windows(ids: Tensor, *, name: str = "tensor", tokenizer: Any = None) -> Windows:
    """Take the rows of an integer tensor (N, T) as windows.

    Raises:
        TextError: not two axes, not integers, empty, shorter than 2, or negative ids.
    """
    found = f"a {str(ids.dtype).removeprefix('torch.')} tensor of shape {tuple(ids.shape)}"
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise TextError(f"windows must have shape (N >= 1, T >= 2), found {found}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TextError(f"windows must hold integer token ids, found {found}")
    # A copy: the record must not change when the caller's tensor does.
    ids = ids.detach().to(device=HOST, dtype=torch.int64, copy=True)
    if int(ids.min()) < 0:
        raise TextError(f"token ids must not be negative, found {int(ids.min())} in {found}")
    return Windows(
        ids=ids,
        starts=torch.full((len(ids),), -1),
        source_index=torch.zeros(len(ids), dtype=torch.int64),
        sources=(name,),
        text_sha256=("",),
        text_tokens=(ids.numel(),),
        tokenizer_sha256="" if tokenizer is None else tokenizer_hash(tokenizer),
        seed=None,
        bos="none",
    )


def longest_window(config: Any) -> int | None:
    """The model's longest window in tokens, None for a configuration without such a limit."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None

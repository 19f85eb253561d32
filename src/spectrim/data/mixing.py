"""Windows of several origins as one calibration set."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectrim.data.windows import Windows
from spectrim.errors import TextError


def interleave(parts: Sequence[Windows]) -> Windows:
    """One set of windows in which the parts alternate, so that every prefix is a fair sample.

    Raises:
        TextError: the parts differ in window length.
    """
    if len(parts) == 1:
        return parts[0]
    lengths = {p.length for p in parts}
    if len(lengths) != 1:
        raise TextError(f"windows of lengths {sorted(lengths)} cannot be mixed; use one length")
    # Position within its part, spread over [0, 1): parts of unequal size alternate proportionally.
    place = torch.cat([(torch.arange(len(p)) + 0.5) / len(p) for p in parts])
    order = torch.argsort(place, stable=True)
    offsets = torch.tensor([0, *(len(p.sources) for p in parts[:-1])]).cumsum(0)
    owners = torch.cat([p.source_index + o for p, o in zip(parts, offsets, strict=True)])
    return Windows(
        ids=torch.cat([p.ids for p in parts])[order],
        starts=torch.cat([p.starts for p in parts])[order],
        source_index=owners[order],
        sources=tuple(s for p in parts for s in p.sources),
        text_sha256=tuple(s for p in parts for s in p.text_sha256),
        text_tokens=tuple(s for p in parts for s in p.text_tokens),
        tokenizer_sha256=next((p.tokenizer_sha256 for p in parts if p.tokenizer_sha256), ""),
        seed=parts[0].seed,
        bos="+".join(dict.fromkeys(p.bos for p in parts)),
        spare=next((p.spare for p in parts if p.spare is not None), None),
    )

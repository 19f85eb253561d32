"""Calibration without data: windows sampled from the model itself.

A language model's own samples are the text it was fitted to, as far as it learned it; they need no
data set and match the model's tokenizer and domain by construction. Sampled windows are windows
like any others: recorded, seeded, and made again from the same seed and model.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectrim.data.sampling import sampled_tokens, uniforms
from spectrim.data.text import DOCUMENT_SEPARATOR, SELF
from spectrim.data.tokens import tokenizer_hash
from spectrim.data.windows import Windows, longest_window
from spectrim.distributed.team import Team
from spectrim.errors import TextError

CACHE_BYTES = 2**31
"""Keys and values of windows that are sampled side by side."""


def sample_windows(
    model: Any,
    *,
    windows: int,
    window_length: int,
    seed: int = 0,
    batch: int | None = None,
    temperature: float = 1.0,
    tokenizer: Any = None,
    team: Team | None = None,
) -> Windows:
    """Sample windows from a model.

    Each window starts with BOS, or with a token drawn uniformly from the vocabulary where the
    model has no BOS. Same model, seed and sizes give the same ids; `batch` changes the rounding of
    the logits only.

    Args:
        model: a Hugging Face causal language model, on any device.
        windows: how many, N.
        window_length: tokens per window, T, the first one included.
        seed: of the generator behind every draw.
        batch: windows sampled side by side; None is 64, or as many whose keys and values take
            2 GiB.
        temperature: 1 samples the model's own distribution.
        tokenizer: only hashed into the record; may be None.
        team: processes that sample a part each, whole batches, so that every logit is rounded as
            in one process; all of them get all windows.

    Raises:
        TextError: sizes or a temperature that cannot be, or windows longer than the model's.
        NonFiniteError: the model's logits are not finite.
    """
    batch = batch if batch is not None else _side_by_side(model, window_length)
    _check_sizes(model, windows, window_length, batch)
    generator = torch.Generator().manual_seed(seed)
    bos, first = _first_tokens(model, windows, generator)
    chances = uniforms(windows, window_length - 1, generator=generator)
    ids, team = torch.zeros(windows, window_length, dtype=torch.int64), team or Team()
    how = {"steps": window_length - 1, "temperature": temperature}
    with _evaluation_mode(model):
        for number, start in enumerate(range(0, windows, batch)):
            if number % team.size != team.rank:
                continue
            part = slice(start, start + batch)
            drawn = sampled_tokens(model, first[part], chances=chances[part], **how)
            ids[part, 0] = first[part, 0]
            ids[part, 1:] = torch.stack(list(drawn), dim=1)
    team.sum_([ids])  # (N, T); zeros wherever another process sampled
    return Windows(
        ids=ids,
        starts=torch.full((windows,), -1),
        source_index=torch.zeros(windows, dtype=torch.int64),
        sources=(SELF,),
        text_sha256=(hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),),
        text_tokens=(ids.numel(),),
        tokenizer_sha256="" if tokenizer is None else tokenizer_hash(tokenizer),
        seed=seed,
        bos="none" if bos is None else "each",
    )


def _first_tokens(
    model: Any, windows: int, generator: torch.Generator
) -> tuple[int | None, Tensor]:
    """BOS if the model has it, and the first token of every window, (N, 1)."""
    bos = _bos_of(model)
    if bos is not None:
        return bos, torch.full((windows, 1), bos)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return None, torch.randint(0, vocabulary, (windows, 1), generator=generator)


def write_self_text(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    separator: str = DOCUMENT_SEPARATOR,
    **sampling: Any,
) -> str:
    """Sample windows and write them to a text file, with `separator` between them.

    Special tokens are left out and white space at the ends of a window is trimmed; `sampling` is
    what `sample_windows` takes.

    Returns:
        The text that was written, UTF-8 in the file.
    """
    sampled = sample_windows(model, **sampling)
    decoded = tokenizer.batch_decode(sampled.ids.tolist(), skip_special_tokens=True)
    content = separator.join(d.strip() for d in decoded) + "\n"
    # A window may end inside a multi-byte character, which decodes to the replacement character.
    content = content.replace("\ufffd", "")
    Path(path).write_bytes(content.encode())
    return content


def _side_by_side(model: Any, length: int) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    numbers = 2 * config.num_hidden_layers * width
    numbers *= getattr(config, "num_key_value_heads", None) or heads
    fitting = CACHE_BYTES // (numbers * length * model.dtype.itemsize)
    return min(64, 2 ** (max(1, fitting).bit_length() - 1))


def _check_sizes(model: Any, windows: int, window_length: int, batch: int) -> None:
    if windows < 1 or batch < 1 or window_length < 2:
        raise TextError(
            f"cannot sample {windows} windows of {window_length} tokens, {batch} at a time; "
            "give at least 1 window, 2 tokens, 1 at a time"
        )
    longest = longest_window(model.config)
    if longest is not None and window_length > longest:
        raise TextError(
            f"a window of {window_length} tokens is longer than the model's {longest} positions; "
            f"ask for at most {longest}"
        )


def _bos_of(model: Any) -> int | None:
    """BOS from the generation settings, else from the configuration."""
    for settings in (getattr(model, "generation_config", None), model.config.get_text_config()):
        bos = getattr(settings, "bos_token_id", None)
        if isinstance(bos, int):
            return bos
    return None


@contextmanager
def _evaluation_mode(model: Any):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

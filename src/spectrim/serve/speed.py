"""Tokens per second: reading a prompt (prefill) and writing one token after another (decode).

The median over repeats, after warm-up runs that are not counted. A number without its machine is
worth nothing, so the record names device, dtype, sizes, threads and version.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.data.windows import longest_window
from spectrim.devices import name_of, wait_for
from spectrim.errors import InputError
from spectrim.evaluate.forward import evaluation_mode


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Attributes:
        prefill: prompt tokens read per second, all sequences together.
        decode: tokens written per second, all sequences together.
        batch: sequences side by side.
        prompt_length: tokens per prompt.
        new_tokens: tokens written per sequence.
        repeats: measurements behind each median.
        cache_bytes: of everything cached for a token of one sequence, at the end of a run; None
            for a cache that does not show its tensors.
        device: name of the device.
        dtype: of the model.
        threads: CPU threads of torch.
        torch_version: version of torch.
    """

    prefill: float
    decode: float
    batch: int
    prompt_length: int
    new_tokens: int
    repeats: int
    cache_bytes: float | None
    device: str
    dtype: str
    threads: int
    torch_version: str

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def speed(
    model: Any,
    *,
    prompt_length: int = 128,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 3,
    warmup: int = 1,
) -> Speed:
    """Measure a model where it lies, on random token ids.

    Args:
        model: a Hugging Face causal language model; its mode is restored afterwards.
        prompt_length: tokens per prompt.
        new_tokens: tokens to write per sequence.
        batch: sequences side by side.
        repeats: counted runs.
        warmup: runs before them that are not counted.

    Raises:
        InputError: sizes below 1, or more tokens than the model has positions.
    """
    if min(prompt_length, new_tokens, batch, repeats) < 1 or warmup < 0:
        raise InputError(
            f"cannot time {repeats} runs (after {warmup}) of {batch} prompts of {prompt_length} "
            f"tokens and {new_tokens} new ones; all but the warm-up must be at least 1"
        )
    longest = longest_window(model.config)
    if longest is not None and prompt_length + new_tokens > longest:
        raise InputError(
            f"a prompt of {prompt_length} and {new_tokens} new tokens exceed the model's "
            f"{longest} positions; measure fewer"
        )
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, weight.shape[0], (batch, prompt_length), generator=generator)
    ids = ids.to(weight.device)
    with evaluation_mode(model):
        runs = [_run(model, ids, new_tokens) for _ in range(warmup + repeats)][warmup:]
    prefill = statistics.median(run[0] for run in runs)
    decode = statistics.median(run[1] for run in runs)
    cached, tokens = runs[-1][2], batch * (prompt_length + new_tokens)
    return Speed(
        prefill=batch * prompt_length / prefill,
        decode=batch * new_tokens / decode,
        batch=batch,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        repeats=repeats,
        cache_bytes=None if cached is None else cached / tokens,
        device=name_of(weight.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
    )


@torch.no_grad()
def _run(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float, int | None]:
    """Seconds of reading the prompt and of writing new tokens greedily; bytes cached after it."""
    wait_for(ids.device)
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True)
    wait_for(ids.device)
    read = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)  # (batch, 1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    wait_for(ids.device)
    return read - start, time.perf_counter() - read, _cache_bytes(output.past_key_values)


def _cache_bytes(cache: Any) -> int | None:
    """What a cache holds, None if it cannot be seen."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    tensors = [
        getattr(layer, name, None)
        for layer in getattr(cache, "layers", [])
        for name in ("keys", "values")
    ]
    held = [t for t in tensors if t is not None]
    if not held or len(held) < len(tensors):
        return None
    return sum(t.numel() * t.element_size() for t in held)

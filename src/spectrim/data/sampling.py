"""Sampling from a language model with a key-value cache and an explicit source of randomness.

One token per step by inverting the cumulative distribution at a uniform number. The numbers are
drawn beforehand on the CPU, one per sequence and step, so that neither the device nor the batch
that a sequence happens to be in changes which numbers it gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import NonFiniteError, TextError


def uniforms(sequences: int, steps: int, *, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), (sequences, steps) fp64, drawn on the CPU."""
    return torch.rand(sequences, steps, generator=generator, dtype=torch.float64)


def pick(logits: Tensor, chance: Tensor | None, *, temperature: float) -> Tensor:
    """The next token of each sequence.

    Args:
        logits: (N, vocabulary).
        chance: uniform numbers (N,), or None for the most likely token.
        temperature: divides the logits.

    Returns:
        Token ids, (N,) int64.

    Raises:
        NonFiniteError: NaN or +inf among the logits.
    """
    logits = logits.double()
    if not bool((logits.amax(-1).isfinite()).all()):
        raise NonFiniteError(
            f"the logits of {int((~logits.amax(-1).isfinite()).sum())} of {len(logits)} sequences "
            "are not finite; the model cannot be sampled"
        )
    if chance is None:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    # Scaling by the last entry keeps a rounded-down total from pointing past the vocabulary.
    point = chance.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)


@torch.no_grad()
def sampled_tokens(
    model: Any, prompt: Tensor, *, steps: int, chances: Tensor | None, temperature: float = 1.0
) -> Iterator[Tensor]:
    """Yield `steps` tokens for each prompt, one step at a time.

    The model must be in evaluation mode; the caller's mode is not touched.

    Args:
        model: a Hugging Face causal language model.
        prompt: token ids (N, P), P >= 1, on any device.
        steps: tokens to add to each prompt.
        chances: uniform numbers (N, steps), or None for greedy decoding.
        temperature: above 0; ignored when greedy.

    Yields:
        Token ids (N,) int64 on the CPU.

    Raises:
        NonFiniteError: the model's logits are not finite.
        TextError: an empty prompt or a temperature that is not above 0.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise TextError(f"prompts must have shape (N, P >= 1), found {tuple(prompt.shape)}")
    if chances is not None and not temperature > 0:
        raise TextError(f"the temperature must be above 0, found {temperature}")
    device = model.get_input_embeddings().weight.device
    ids, cache = prompt.to(device), None
    for step in range(steps):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chance = None if chances is None else chances[:, step]
        token = pick(output.logits[:, -1], chance, temperature=temperature)
        yield token.cpu()
        ids = token[:, None]

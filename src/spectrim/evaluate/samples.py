"""The same prompts continued by several models, to be read side by side.

Every model gets the same random numbers, so that two models with the same distribution write the
same words and a difference is the models', not the dice's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectrim.data.sampling import sampled_tokens, uniforms
from spectrim.data.windows import longest_window
from spectrim.errors import TextError
from spectrim.evaluate.forward import evaluation_mode


@dataclass(frozen=True)
class Sample:
    """One prompt and what one model made of it.

    Attributes:
        model: the name that was given to the model.
        prompt: the user's words.
        continuation: decoded text after the prompt, without special tokens.
        tokens: the ids behind it.
    """

    model: str
    prompt: str
    continuation: str
    tokens: tuple[int, ...]


def continuations(
    models: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Sample]:
    """Continue prompts with several models that share a tokenizer.

    Args:
        models: name -> Hugging Face causal language model; modes are restored afterwards.
        tokenizer: encodes the prompts with its own special tokens.
        prompts: texts to continue.
        new_tokens: tokens to add; fewer where the model ends the text or runs out of positions.
        temperature: 0 takes the most likely token each time, otherwise logits are divided by it.
        seed: of the random numbers, which are the same for every model.

    Returns:
        One sample per prompt and model, prompts outermost.

    Raises:
        TextError: an empty prompt, one as long as the model, or a negative temperature.
        NonFiniteError: a model's logits are not finite.
    """
    if temperature < 0 or new_tokens < 1:
        raise TextError(
            f"temperature must be at least 0 and new_tokens at least 1; found {temperature} and "
            f"{new_tokens}"
        )
    samples = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
        if ids.shape[1] == 0:
            raise TextError(f"the prompt {prompt!r} has no tokens; give at least one word")
        generator = torch.Generator().manual_seed(seed)
        chances = uniforms(1, new_tokens, generator=generator) if temperature > 0 else None
        for name, model in models.items():
            tokens = _continue(model, ids, chances, new_tokens, temperature)
            text = _decoded_after(tokenizer, ids[0].tolist(), tokens)
            samples.append(Sample(name, prompt, text, tuple(tokens)))
    return samples


def _decoded_after(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """The continuation as it reads after the prompt."""
    # Decoded alone, it would lose its first space with SentencePiece tokenizers.
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _continue(model: Any, ids: torch.Tensor, chances, new_tokens: int, temperature: float):
    longest = longest_window(model.config)
    room = new_tokens if longest is None else min(new_tokens, longest - ids.shape[1])
    if room < 1:
        raise TextError(
            f"the prompt has {ids.shape[1]} tokens, the model {longest} positions; shorten the "
            "prompt so that there is room for a continuation"
        )
    ends = _end_ids(model)
    tokens: list[int] = []
    with evaluation_mode(model):
        for token in sampled_tokens(
            model, ids, steps=room, chances=chances, temperature=temperature
        ):
            if int(token) in ends:
                break
            tokens.append(int(token))
    return tokens


def _end_ids(model: Any) -> frozenset[int]:
    settings = getattr(model, "generation_config", None) or model.config.get_text_config()
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends) if isinstance(ends, list | tuple) else frozenset([ends])

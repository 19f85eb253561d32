"""How the models of a study are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spectrim.arguments import check_whole
from spectrim.errors import InputError
from spectrim.measure.measuring import Reference, open_reference
from spectrim.recipe import Recipe
from spectrim.run.texts import UserText

__all__ = ["Measure", "different_names"]


@dataclass(frozen=True)
class Measure:
    """How the models of a study are measured.

    Attributes:
        text: evaluation text, None for wikitext2.
        window_length: tokens per window; None for 2048 or the model's longest, or `max`.
        max_tokens: score at most this many tokens.
        batch: windows per forward pass.
        device: `auto` or a torch device.
        dtype: `auto` is fp32 on a CPU.
        trust_remote_code: run code that comes with the checkpoint.
    """

    text: UserText = None
    window_length: int | Literal["max"] | None = None
    max_tokens: int | None = None
    batch: int = 8
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_whole(batch=self.batch)
        check_whole(least=2, max_tokens=self.max_tokens)
        if self.window_length != "max":
            check_whole(least=2, window_length=self.window_length)

    def reference(self, model: str | Path | nn.Module, tokenizer: Any = None) -> Reference:
        """The dense model, loaded and measured."""
        return open_reference(model, tokenizer=tokenizer, **vars(self))


def different_names(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, if pictures and tables can tell them apart by name.

    Raises:
        InputError: two of one name.
    """
    names = [recipe.name for recipe in recipes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"two recipes are called {twice[0]!r}; give one of them another name")
    return list(recipes)

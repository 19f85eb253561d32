"""How the models of a study are measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import nn

from spectrim.api.evaluating import evaluation_windows_of
from spectrim.arguments import check_whole
from spectrim.data.corpora import CORPORA
from spectrim.data.text import SELF, split_sources
from spectrim.data.windows import Windows
from spectrim.errors import InputError
from spectrim.evaluate.perplexity import perplexity
from spectrim.recipe import Recipe
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.options import RunOptions
from spectrim.run.texts import UserText
from spectrim.studies.reference import Reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measure:
    """How the models of a study are measured.

    Attributes:
        text: evaluation text, None for wikitext2.
        window_length: tokens per window; None for 2048 or the model's longest, or `max`.
        max_tokens: score at most this many tokens.
        batch: windows per forward pass.
        options: how models are loaded, and who is told of what is measured.
    """

    text: UserText = None
    window_length: int | Literal["max"] | None = None
    max_tokens: int | None = None
    batch: int = 8
    options: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_whole(batch=self.batch)
        check_whole(least=2, max_tokens=self.max_tokens)
        if self.window_length != "max":
            check_whole(least=2, window_length=self.window_length)

    def windows(self, loaded: LoadedModel) -> Windows:
        """What a model is measured on."""
        return evaluation_windows_of(loaded, self.text, self.window_length, self.max_tokens)

    def reference(self, model: str | Path | nn.Module) -> Reference:
        """The dense model, loaded and measured."""
        loaded = load_model(model, self.options)
        windows = self.windows(loaded)
        found = perplexity(loaded.model, windows, batch=self.batch)
        return Reference(loaded, windows, found, self.batch, self.options.progress)


def measured_on(measure: Measure | None, text: UserText) -> Measure:
    """The measure, on the calibration text where the user names no other text.

    A study of local files then needs no network. Named corpora have a part of their own for
    evaluation; of a file the same words are read, and the log says so before anything starts.

    Raises:
        InputError: windows sampled from the model are no text to measure on.
    """
    measure = measure or Measure()
    if measure.text is not None or text is None:
        return measure
    if not isinstance(text, str | Path):
        return replace(measure, text=text)
    names = [name for name, _ in split_sources(text)]
    chosen = next((name for name in names if name != SELF), None)
    if chosen is None:
        raise InputError(
            "the calibration text is sampled from the model; name a text to measure on "
            "(--evaluation-text)"
        )
    if chosen not in CORPORA:
        logger.warning(
            "measuring on the calibration text %s itself, for want of another "
            "(--evaluation-text): losses on unread text are larger",
            *(Path(chosen).name,),
        )
    return replace(measure, text=chosen)


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

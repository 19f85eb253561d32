"""The calibration windows that a recipe asks for, whatever form the user's text has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.data.mixing import interleave
from spectrim.data.self_text import sample_windows
from spectrim.data.text import read_text
from spectrim.data.windows import Windows, calibration_windows, given_windows, longest_window
from spectrim.distributed.team import Team
from spectrim.errors import TextError
from spectrim.recipe import Calibration
from spectrim.run.loading import LoadedModel

__all__ = ["UserText", "gather_windows"]

UserText = str | Path | Sequence[str] | Tensor | None


def gather_windows(
    loaded: LoadedModel,
    calibration: Calibration,
    text: UserText,
    *,
    seed: int,
    team: Team | None = None,
) -> Windows:
    """Windows for a run.

    Args:
        loaded: the model; sampled from when the source is `self`.
        calibration: the recipe's section; its window length is cut to the model's longest.
        text: the user's own text: a tensor (N, T) of windows or a list of documents takes the
            place of the recipe's sources; None for the recipe's sources.
        seed: of the window positions.
        team: processes that share the sampling; every one gets all windows.

    Raises:
        TextError: no tokenizer for a text, too little text, unknown source.
    """
    if isinstance(text, Tensor):
        windows = given_windows(text, tokenizer=loaded.tokenizer)
        windows.check_vocabulary(vocabulary_size(loaded.model))
        return windows
    longest = longest_window(loaded.model.config)
    length = min(calibration.window_length, longest or calibration.window_length)
    sources = _named(calibration.text) if text is None else _user_sources(text)
    own = calibration.windows // len(sources) if "self" in sources else 0
    parts = []
    if "self" in sources:
        parts.append(
            sample_windows(
                loaded.model,
                windows=own,
                window_length=length,
                seed=seed,
                tokenizer=loaded.tokenizer,
                team=team,
            )
        )
    others = [s for s in sources if s != "self"]
    if others:
        parts.append(
            _text_windows(loaded, others, calibration, length, seed, calibration.windows - own)
        )
    return interleave(parts)


def vocabulary_size(model: Any) -> int:
    """Number of embeddings."""
    return model.get_input_embeddings().weight.shape[0]


def _text_windows(
    loaded: LoadedModel, sources: list, calibration: Calibration, length: int, seed: int, count: int
) -> Windows:
    if loaded.tokenizer is None:
        raise TextError(
            f"{loaded.name!r} has no tokenizer; give token windows (N, T) or text 'self'"
        )
    windows = calibration_windows(
        [read_text(source) for source in sources],
        loaded.tokenizer,
        windows=count,
        window_length=length,
        seed=seed,
        bos=calibration.bos,
    )
    windows.check_vocabulary(vocabulary_size(loaded.model))
    return windows


def _named(text: str | tuple[str, ...]) -> list:
    return [text] if isinstance(text, str) else list(text)


def _user_sources(text) -> list:
    """A source name or path, several of them separated by commas, or one list of documents."""
    if isinstance(text, (str, Path)):
        return [part.strip() for part in str(text).split(",")]
    return [list(text)]

"""The calibration windows that a recipe asks for, whatever form the user's text has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.allocate.budget import format_bytes
from spectrim.data.mixing import interleave
from spectrim.data.self_text import sample_windows
from spectrim.data.text import SELF, find_file, read_text, split_sources
from spectrim.data.windows import (
    Windows,
    calibration_windows,
    given_windows,
    longest_window,
    share_out,
)
from spectrim.devices import HOST
from spectrim.distributed.team import Team
from spectrim.errors import InputError, TextError
from spectrim.recipe import Calibration
from spectrim.run.loading import LoadedModel
from spectrim.run.memory import available_bytes

UserText = str | Path | Sequence[str] | Tensor | None

SHORTEST = 64
"""Tokens that a window of a recipe's length may be shortened to where a text has no more."""


def own_text(text: Any) -> Sequence[str] | Tensor | None:
    """The user's own text, which a recipe cannot name; None for source names and files.

    Args:
        text: documents, also as a data set with a column `text`; token windows (N, T), also as a
            NumPy array; a source name or a file.

    Raises:
        TextError: anything else.
    """
    if text is None or isinstance(text, str | Path):
        return None
    if isinstance(text, Tensor):
        return text
    if isinstance(text, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(text))
    columns = getattr(text, "column_names", None)
    if isinstance(columns, list) and "text" in columns:
        return list(text["text"])
    if not isinstance(text, Sequence):
        raise TextError(
            f"text is a {type(text).__name__}; expected a source name or file, documents, a data "
            "set with a column 'text', or token windows (N, T)"
        )
    files = [one for one in text if isinstance(one, str | Path) and is_file(one)]
    if files and len(files) == len(text):
        raise TextError(
            f"a list is taken as documents, and this one holds names of files ({files[0]}, ...); "
            "give files as one text, separated by commas"
        )
    return text


def look_up(*texts: Any) -> None:
    """Refuse names without a file before a model is loaded for them.

    Raises:
        TextError: see `data.text.find_file`.
    """
    for text in texts:
        for name, _ in split_sources(text) if isinstance(text, str | Path) else ():
            find_file(name)


def is_file(name: str | Path) -> bool:
    """Whether a file has this name; a document is too long to be one."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def gather_windows(
    loaded: LoadedModel,
    calibration: Calibration,
    text: UserText,
    *,
    seed: int,
    team: Team | None = None,
    exactly: bool = False,
) -> Windows:
    """Windows for a run.

    Args:
        loaded: the model; sampled from when the source is `self`.
        calibration: the recipe's section, its windows settled; their length is cut to the model's
            longest.
        text: the user's own text: a tensor (N, T) of windows or a list of documents takes the
            place of the recipe's sources; None for the recipe's sources.
        seed: of the window positions.
        team: processes that share the sampling; every one gets all windows.
        exactly: refuse windows of another length than the calibration's, which the user asked
            for; otherwise they are as long as the model and the text allow.

    Raises:
        TextError: no tokenizer for a text, too little text, unknown source.
        InputError: more windows than memory holds.
    """
    if isinstance(text, Tensor):
        windows = given_windows(text, tokenizer=loaded.tokenizer)
        windows.check_vocabulary(vocabulary_size(loaded.model))
        return windows
    assert calibration.windows is not None and calibration.window_length is not None  # settled
    length = _possible(loaded, calibration.window_length, exactly=exactly)
    _check_room(calibration.windows, length)
    sources = _sources(calibration.text) if text is None else _user_sources(text)
    counts = share_out(calibration.windows, [share for _, share in sources])
    if min(counts) < 1:
        raise TextError(
            f"{calibration.windows} windows cannot be shared by {len(sources)} texts so that each "
            "has one; give more windows or larger shares"
        )
    counted = [(source, count) for (source, _), count in zip(sources, counts, strict=True)]
    own = sum(count for source, count in counted if source == SELF)
    parts = []
    if own:
        how = {"seed": seed, "tokenizer": loaded.tokenizer, "team": team}
        parts.append(sample_windows(loaded.model, windows=own, window_length=length, **how))
    others = [(source, count) for source, count in counted if source != SELF]
    if others:
        shortest = None if exactly or own else SHORTEST
        drawn = _text_windows(loaded, others, calibration, length, seed, shortest=shortest)
        parts.append(drawn)
    return interleave(parts)


def _possible(loaded: LoadedModel, asked: int, *, exactly: bool) -> int:
    """Tokens per window, as many as were asked for or as the model has positions.

    Raises:
        TextError: exactly as many are wanted, and the model has less.
    """
    longest = longest_window(loaded.model.config)
    if exactly and longest is not None and longest < asked:
        raise TextError(
            f"windows of {asked} tokens are longer than the {longest} positions of {loaded.name}; "
            f"ask for at most {longest}"
        )
    return min(asked, longest or asked)


def vocabulary_size(model: Any) -> int:
    """Number of embeddings."""
    return model.get_input_embeddings().weight.shape[0]


def _check_room(windows: int, length: int) -> None:
    """Refuse what would only fill the memory; the hidden states take far more."""
    needed, free = 2 * 8 * windows * length, available_bytes(HOST)
    if free is not None and needed > free:
        raise InputError(
            f"{windows} windows of {length} tokens take {format_bytes(needed)} as tokens alone, "
            f"and {format_bytes(free)} are free; ask for fewer"
        )


def _text_windows(
    loaded: LoadedModel,
    sources: Sequence[tuple[Any, int]],
    calibration: Calibration,
    length: int,
    seed: int,
    *,
    shortest: int | None,
) -> Windows:
    if loaded.tokenizer is None:
        raise TextError(
            f"{loaded.name!r} has no tokenizer; give token windows (N, T) or text 'self'"
        )
    counts = [count for _, count in sources]
    windows = calibration_windows(
        [read_text(source, tokenizer=loaded.tokenizer) for source, _ in sources],
        loaded.tokenizer,
        windows=sum(counts),
        window_length=length,
        shortest=shortest,
        seed=seed,
        bos=calibration.bos,
        shares=counts,
    )
    windows.check_vocabulary(vocabulary_size(loaded.model))
    return windows


def _sources(text: str | tuple[str, ...]) -> list[tuple[Any, float]]:
    """A recipe's sources with their shares."""
    return list(split_sources(text if isinstance(text, str) else ",".join(text)))


def _user_sources(text: Any) -> list[tuple[Any, float]]:
    """Sources or files separated by commas, with their shares, or one list of documents."""
    return _sources(str(text)) if isinstance(text, str | Path) else [(list(text), 1.0)]

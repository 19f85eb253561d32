"""Measure one model, dense or compressed: perplexity with its protocol, parameters, bytes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spectrim.arguments import check_whole, refuse_unused
from spectrim.data.text import read_text
from spectrim.data.windows import Windows, evaluation_windows, given_windows, longest_window
from spectrim.errors import InputError, TextError
from spectrim.evaluate.agreement import agreement
from spectrim.evaluate.perplexity import perplexity
from spectrim.evaluate.zero_shot import zero_shot
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.texts import SHORTEST, UserText, own_text

__all__ = ["evaluate_model", "evaluation_windows_of"]

logger = logging.getLogger(__name__)

LITERATURE_WINDOW = 2048
DEFAULT_TEXT = "wikitext2"


def evaluation_windows_of(
    loaded: LoadedModel,
    text: UserText,
    window_length: int | Literal["max"] | None,
    max_tokens: int | None,
) -> Windows:
    """Windows to measure a model on; the literature's text and length where nothing is given."""
    check_whole(least=2, max_tokens=max_tokens)
    if window_length != "max":
        check_whole(least=2, window_length=window_length)
    given = own_text(text)
    if isinstance(given, torch.Tensor):
        words = {"window_length": window_length, "max_tokens": max_tokens}
        refuse_unused("the text is token windows", words)
        return given_windows(given, tokenizer=loaded.tokenizer)
    source: Any = text if given is None else given
    if loaded.tokenizer is None:
        raise TextError(f"{loaded.name!r} has no tokenizer; give token windows (N, T)")
    longest = longest_window(loaded.model.config)
    length = window_length or min(LITERATURE_WINDOW, longest or LITERATURE_WINDOW)
    return evaluation_windows(
        read_text(DEFAULT_TEXT if source is None else source, split="evaluation"),
        loaded.tokenizer,
        window_length=length,
        max_tokens=max_tokens,
        shortest=SHORTEST if window_length is None else None,
        config=loaded.model.config,
    )


def _sizes(model: nn.Module) -> dict[str, int]:
    tensors = {id(p): p for p in model.parameters()}.values()
    return {
        "parameters": sum(p.numel() for p in tensors),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in tensors),
    }


def _folder_bytes(name: str) -> int | None:
    folder = Path(name)
    if not folder.is_dir():
        return None
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def evaluate_model(
    model: str | Path | nn.Module,
    *,
    text: UserText = None,
    against: str | Path | nn.Module | None = None,
    window_length: int | Literal["max"] | None = None,
    max_tokens: int | None = None,
    batch: int = 8,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    task_folders: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Perplexity on every text, parameters and bytes; with `against` also agreement with it.

    Of several texts and tasks, one whose data is not to be had is named under `skipped`.

    Args:
        model: a hub name, a folder, or a model object.
        text: source names or files separated by commas, documents, or token windows (N, T).
        against: the dense model to compare distributions with.
        window_length: tokens per window; None for 2048 or the model's longest, or `max`.
        max_tokens: score at most this many tokens of a text.
        batch: windows per forward pass.
        device: `auto` or a torch device.
        dtype: `auto` is fp32 on a CPU.
        tokenizer: for model objects.
        trust_remote_code: run code that comes with the checkpoint.
        tasks: zero-shot tasks by name, or `literature` or `offline`; see `evaluate.zero_shot`.
        limit: questions per task, None for all.
        task_folders: task files of the user's own.

    Raises:
        SpectrimError: unknown text or task, non-finite losses, unloadable models.
    """
    check_whole(batch=batch, limit=limit)
    wanted = _task_names(tasks)
    if not wanted:
        given = {"limit": limit, "task_folders": tuple(task_folders)}
        refuse_unused("it is for tasks, and none are named", given)
    elif text is None and against is None:
        given = {"window_length": window_length, "max_tokens": max_tokens}
        refuse_unused("it is for a text, and tasks alone read none", given)
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded = load_model(model, tokenizer=tokenizer, **options)
    reference = None if against is None else load_model(against, **options)
    result: dict[str, Any] = {
        "model": loaded.name,
        "stored_bytes": _folder_bytes(loaded.name),
        **_sizes(loaded.model),
        "perplexity": {},
        "skipped": {},
    }
    # Tasks alone need no text; a comparison does.
    names = [] if text is None and wanted and reference is None else _text_names(text)
    for name in names:
        try:
            windows = evaluation_windows_of(loaded, name, window_length, max_tokens)
        except TextError as error:
            # One of several things that was asked for: the others still get their numbers.
            if len(names) + len(wanted) == 1:
                raise
            result["skipped"][str(name)] = str(error)
            logger.warning("%s was skipped: %s", name, error)
            continue
        label = name if isinstance(name, str) else windows.sources[0]
        result["perplexity"][label] = perplexity(loaded.model, windows, batch=batch).record()
        if reference is not None:
            result.setdefault("agreement", {})[label] = agreement(
                reference.model, loaded.model, windows, batch=batch
            ).record()
    if wanted:
        result["zero_shot"] = zero_shot(
            loaded.model,
            loaded.tokenizer,
            wanted,
            limit=limit,
            batch=batch,
            task_folders=task_folders,
        ).record()
        result["skipped"] |= result["zero_shot"]["skipped"]
        if not result["zero_shot"]["tasks"] and not result["perplexity"]:
            raise InputError(
                "none of what was asked for could be measured: "
                + "; ".join(result["skipped"].values())
            )
    return result


def _text_names(text: UserText) -> list[Any]:
    if isinstance(text, str | Path):
        return [part.strip() for part in str(text).split(",")]
    return [text]


def _task_names(tasks: str | Sequence[str]) -> list[str]:
    if isinstance(tasks, str):
        return [part.strip() for part in tasks.split(",") if part.strip()]
    if not isinstance(tasks, Sequence) or not all(isinstance(task, str) for task in tasks):
        raise InputError(f"tasks is {str(tasks)[:80]}; expected names of tasks")
    return list(tasks)

"""Measure models, dense or compressed: perplexity with its protocol, tasks, parameters, bytes.

With a dense model to compare with, that one is measured first and once, on the same windows and
questions, so that differences are paired.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from spectrim.arguments import check_path, check_whole, refuse_unused
from spectrim.data.text import read_text
from spectrim.data.windows import (
    EvaluationBos,
    Windows,
    evaluation_windows,
    given_windows,
    longest_window,
)
from spectrim.errors import InputError, TextError
from spectrim.evaluate.agreement import agreement
from spectrim.evaluate.bootstrap import perplexity_difference
from spectrim.evaluate.perplexity import Perplexity, perplexity
from spectrim.evaluate.zero_shot import ZeroShot, task_difference, zero_shot
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.options import RunOptions
from spectrim.run.reading_words import EvaluateWords
from spectrim.run.texts import SHORTEST, UserText, own_text
from spectrim.run.wearing import check_adapter, wearing
from spectrim.run.word import takes

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

LITERATURE_WINDOW = 2048
DEFAULT_TEXT = "wikitext2"


def evaluation_windows_of(
    loaded: LoadedModel,
    text: UserText,
    window_length: int | Literal["max"] | None,
    max_tokens: int | None,
    bos: EvaluationBos = "none",
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
        read_text(
            DEFAULT_TEXT if source is None else source,
            split="evaluation",
            tokenizer=loaded.tokenizer,
        ),
        loaded.tokenizer,
        window_length=length,
        max_tokens=max_tokens,
        shortest=SHORTEST if window_length is None else None,
        bos=bos,
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


@dataclass(frozen=True)
class _Protocol:
    """How every model of one evaluation is measured."""

    texts: tuple[Any, ...]
    tasks: tuple[str, ...]
    window_length: int | Literal["max"] | None
    max_tokens: int | None
    batch: int
    bos: EvaluationBos
    limit: int | None
    task_folders: tuple[str | Path, ...]


@dataclass
class _Measured:
    """One model with what paired differences need."""

    loaded: LoadedModel
    record: dict[str, Any]
    windows: dict[str, Windows] = field(default_factory=dict)
    perplexities: dict[str, Perplexity] = field(default_factory=dict)
    tasks: ZeroShot | None = None


@takes(EvaluateWords)
def evaluate_models(
    models: Sequence[str | Path | nn.Module], **words: Unpack[EvaluateWords]
) -> list[dict[str, Any]]:
    """Perplexity on every text, task accuracies, parameters and bytes of every model.

    Of several texts and tasks, one whose data is not to be had is named under `skipped`. A dense
    model to compare with is measured first, and every other one is held against it: KL divergence
    and agreement, and paired differences of losses and accuracies.

    Args:
        models: hub names, folders, or model objects; an adapter is put on the objects.
        **words: those below; a text can also be documents or token windows (N, T).

    Returns:
        One record per model, the dense one first where there is one to compare with.

    Raises:
        SpectrimError: unknown text or task, non-finite losses, unloadable models.
    """
    asked: dict[str, Any] = dict(words)
    options, against, batch = RunOptions.among(asked), asked["against"], asked["batch"]
    protocol, adapter = _protocol(asked), asked["adapter"]
    check_path(adapter=adapter)
    if adapter is not None:
        check_adapter(adapter)
    records, dense = [], None
    if against is not None:
        dense = _measure(load_model(against, replace(options, tokenizer=None)), protocol)
        records.append(dense.record)
    for model in models:
        named = isinstance(model, str | Path) and str(model) == str(against)
        if named and len(models) > 1 and adapter is None:
            continue  # it has its row already
        loaded = load_model(model, options)
        found = _measure(loaded if adapter is None else wearing(loaded, adapter), protocol)
        if adapter is not None:
            _name_adapter(found.record, adapter)
        if dense is not None:
            _hold_against(dense, found, batch)
        records.append(found.record)
    return records


def _protocol(asked: dict[str, Any]) -> _Protocol:
    """How all models are measured.

    Raises:
        InputError: words that contradict each other, or have no effect.
    """
    text, bos = asked["text"], asked["bos"]
    check_whole(batch=asked["batch"], limit=asked["limit"])
    wanted = _task_names(asked["tasks"])
    task_folders = tuple(asked["task_folders"])
    if not wanted:
        given = {"limit": asked["limit"], "task_folders": task_folders}
        refuse_unused("it is for tasks, and none are named", given)
    elif text is None:
        given = {name: asked[name] for name in ("window_length", "max_tokens")}
        refuse_unused("it is for a text, and tasks alone read none", given)
    if bos not in get_args(EvaluationBos):
        raise InputError(f"bos is {bos!r}; use {', '.join(get_args(EvaluationBos))}")
    return _Protocol(
        # Tasks alone need no text.
        texts=() if text is None and wanted else tuple(_text_names(text)),
        tasks=tuple(wanted),
        bos=bos,
        task_folders=task_folders,
        **{n: asked[n] for n in ("window_length", "max_tokens", "batch", "limit")},
    )


def _measure(loaded: LoadedModel, protocol: _Protocol) -> _Measured:
    found = _Measured(
        loaded,
        {
            "model": loaded.name,
            "stored_bytes": _folder_bytes(loaded.name),
            **_sizes(loaded.model),
            "perplexity": {},
            "skipped": {},
        },
    )
    for name in protocol.texts:
        try:
            windows = evaluation_windows_of(
                loaded, name, protocol.window_length, protocol.max_tokens, protocol.bos
            )
        except TextError as error:
            # One of several things that was asked for: the others still get their numbers.
            if len(protocol.texts) + len(protocol.tasks) == 1:
                raise
            found.record["skipped"][str(name)] = str(error)
            logger.warning("%s was skipped: %s", name, error)
            continue
        label = name if isinstance(name, str) else windows.sources[0]
        found.windows[label] = windows
        found.perplexities[label] = perplexity(loaded.model, windows, batch=protocol.batch)
        found.record["perplexity"][label] = found.perplexities[label].record()
    if protocol.tasks:
        found.tasks = zero_shot(
            loaded.model,
            loaded.tokenizer,
            protocol.tasks,
            limit=protocol.limit,
            batch=protocol.batch,
            bos=protocol.bos != "none",
            task_folders=protocol.task_folders,
        )
        found.record["zero_shot"] = found.tasks.record()
        found.record["skipped"] |= found.tasks.skipped
        if not found.tasks.tasks and not found.perplexities:
            raise InputError(
                "none of what was asked for could be measured: "
                + "; ".join(found.record["skipped"].values())
            )
    return found


def _name_adapter(record: dict[str, Any], adapter: str | Path) -> None:
    """Say what was measured, and count the adapter's bytes as stored ones."""
    record["model"] += f" + {adapter}"
    if record["stored_bytes"] is not None:
        record["stored_bytes"] += _folder_bytes(str(adapter)) or 0


def _hold_against(dense: _Measured, found: _Measured, batch: int) -> None:
    """Add agreement and paired differences to a model's record.

    Where the two tokenize or window a text in different ways nothing is paired, and `agreement`
    refuses models of different vocabularies.
    """
    for label, windows in found.windows.items():
        near = agreement(dense.loaded.model, found.loaded.model, windows, batch=batch)
        found.record.setdefault("agreement", {})[label] = near.record()
        ours, theirs = found.perplexities[label], dense.perplexities.get(label)
        paired = theirs is not None and (
            ours.protocol["fingerprint"] == theirs.protocol["fingerprint"]
        )
        if theirs is not None and paired and len(windows) > 1:
            generator = torch.Generator().manual_seed(0)
            difference = perplexity_difference(ours, theirs, generator=generator)
            found.record.setdefault("difference", {})[label] = difference.record()
    if found.tasks is not None and dense.tasks is not None:
        found.record["zero_shot"]["difference"] = task_difference(found.tasks, dense.tasks)


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

"""One compressed model beside the dense one on the same windows: what curve and compare measure."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim import __version__
from spectrim.data.windows import Windows, given_windows
from spectrim.errors import ArtifactError, InputError
from spectrim.evaluate.agreement import agreement
from spectrim.evaluate.bootstrap import perplexity_difference
from spectrim.evaluate.perplexity import Perplexity, perplexity
from spectrim.evaluate.points import CurvePoint
from spectrim.recipe import Recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.progress import Progress, Silent
from spectrim.run.texts import UserText
from spectrim.storage.json_file import as_json, read_json
from spectrim.storage.whole_file import write_text

logger = logging.getLogger(__name__)


@dataclass
class Reference:
    """The dense model and everything that is measured only once.

    Attributes:
        loaded: the dense model; never changed.
        windows: evaluation windows.
        perplexity: of the dense model on them.
        batch: windows per forward pass.
        progress: told of what is measured.
    """

    loaded: LoadedModel
    windows: Windows
    perplexity: Perplexity
    batch: int
    progress: Progress = field(default_factory=Silent)

    def measure(self, model: nn.Module, size: Size, *, recipe: str, seconds: float) -> Measured:
        """Perplexity and divergence of a model on the reference's windows.

        Args:
            model: compressed; anything that shares the vocabulary.
            size: what it was asked for and what it takes.
            recipe: name in tables and pictures.
            seconds: that its compression took.
        """
        found = perplexity(model, self.windows, batch=self.batch)
        near = agreement(self.loaded.model, model, self.windows, batch=self.batch)
        low, high = excess_interval(found, self.perplexity)
        record = near.record()
        point = CurvePoint(
            recipe=recipe,
            keep=size.keep,
            achieved=size.target_bytes / size.dense_target_bytes,
            target_bytes=size.target_bytes,
            model_bytes=size.model_bytes,
            bits_per_weight=8 * size.target_bytes / size.target_weights,
            nll=found.nll,
            perplexity=found.perplexity,
            excess=found.nll - self.perplexity.nll,
            excess_low=low,
            excess_high=high,
            kl=near.kl,
            kl_error=record["kl_standard_error"],
            top1=near.top1,
            seconds=seconds,
            peak_bytes=size.peak_bytes,
        )
        return Measured(point, found.per_window_nll.tolist())

    def dense_record(self) -> dict[str, Any]:
        """The dense model's numbers, JSON-ready."""
        return {"model": self.loaded.name, **self.perplexity.record()}


@dataclass(frozen=True)
class Size:
    """What a compressed model was asked for and what it takes.

    Attributes:
        keep: asked for.
        target_bytes: of the targets, as stored.
        dense_target_bytes: of the targets before.
        model_bytes: of everything, as stored.
        target_weights: number of weights of the targets before.
        peak_bytes: of the process that compressed it alone, else None.
    """

    keep: float
    target_bytes: int
    dense_target_bytes: int
    model_bytes: int
    target_weights: int
    peak_bytes: int | None = None

    @classmethod
    def from_report(cls, report: dict[str, Any], *, alone: bool = False) -> Size:
        """From the report of a run; with `alone` its peak memory counts."""
        keep = report["keep"]
        return cls(
            keep=keep["asked"],
            target_bytes=keep["target_bytes"]["stored"],
            dense_target_bytes=keep["target_bytes"]["dense"],
            model_bytes=keep["model_bytes"]["stored"],
            target_weights=sum(t["shape"][0] * t["shape"][1] for t in report["targets"]),
            peak_bytes=report["peak_memory_bytes"] if alone else None,
        )


@dataclass(frozen=True)
class Measured:
    """A point and the losses of its single windows, which paired comparisons need."""

    point: CurvePoint
    per_window_nll: list[float]

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"point": self.point.record(), "per_window_nll": self.per_window_nll}


def excess_interval(
    found: Perplexity, dense: Perplexity, *, seed: int = 0
) -> tuple[float | None, float | None]:
    """95 % interval of the loss above another's; None where one window leaves nothing to draw."""
    if len(found.per_window_nll) < 2:
        return None, None
    generator = torch.Generator().manual_seed(seed)
    difference = perplexity_difference(found, dense, generator=generator)
    return difference.nll_low, difference.nll_high


class PointStore:
    """Finished results, one JSON file each, so that a run that was cut off goes on where it was.

    A file's name is the hash of everything its numbers depend on: the recipe with its size, the
    model, both texts, and the version.

    Attributes:
        folder: where the files lie; None keeps nothing.
        damaged: names of the files that could not be used.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.damaged: list[str] = []

    @staticmethod
    def key(recipe: Recipe, reference: Reference, text: UserText, *, alone: bool = False) -> str:
        """The name of a point."""
        kind = "alone" if alone else "together"
        return result_key(recipe, reference.loaded, reference.windows, text, kind=kind)

    def find(self, key: str) -> Measured | None:
        """A finished point; None, and a warning, if its file is damaged."""
        data = self.read(key)
        if data is None:
            return None
        try:
            return Measured(CurvePoint.from_record(data["point"]), list(data["per_window_nll"]))
        except (InputError, KeyError, TypeError) as error:
            self._damaged(key, error)
            return None

    def keep(self, key: str, measured: Measured) -> None:
        """Write a finished point, whole or not at all."""
        self.write(key, measured.record())

    def read(self, key: str) -> dict[str, Any] | None:
        """A finished result of any kind; None if it is missing or, with a warning, damaged."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.json"
        if not path.is_file():
            return None
        try:
            return read_json(path)
        except ArtifactError as error:
            self._damaged(key, error)
            return None

    def _damaged(self, key: str, error: Exception) -> None:
        """A damaged cache costs time, never a result."""
        self.damaged.append(key)
        logger.warning(
            "the finished point %s/%s.json is damaged (%s) and is measured again",
            *(self.folder, key, error),
        )

    def write(self, key: str, record: dict[str, Any]) -> None:
        """Write a finished result, whole or not at all."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{key}.json", as_json(record, indent=1))


def result_key(
    recipe: Recipe, loaded: LoadedModel, windows: Windows, text: UserText, *, kind: str
) -> str:
    """The hash of everything that a result depends on.

    Args:
        recipe: resolved, with its size.
        loaded: the dense model.
        windows: to measure on.
        text: calibration text that the recipe cannot name.
        kind: of result, since several kinds of one run may lie in one folder.
    """
    parts = [
        recipe.hash(),
        loaded.identity(),
        windows.fingerprint(),
        str(loaded.model.dtype),
        calibration_hash(recipe, text),
        kind,
        __version__,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def calibration_hash(recipe: Recipe, text: UserText) -> str:
    """What the calibration text says, not only what it is called."""
    if isinstance(text, Tensor):
        return given_windows(text).fingerprint()
    digest = hashlib.sha256()
    if text is not None and not isinstance(text, str | Path):
        for document in text:
            digest.update(document.encode())
        return digest.hexdigest()
    for name in _names(recipe.calibration.text):
        digest.update(name.encode())
        if Path(name).is_file():
            digest.update(Path(name).read_bytes())
    return digest.hexdigest()


def _names(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)

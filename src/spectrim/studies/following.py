"""A result along the depth of the network, beside what its decompositions promised.

For every target three relative squared errors stand side by side:

    predicted   of the decomposition, in its own objective, on the calibration inputs
    calibrated  of the layer that was made, on the inputs that the run gathered for it
    held_out    ‖y − y'‖² / ‖y‖² of its outputs on the evaluation text, original network against
                compressed one, so that what all layers before it did is contained

The first two say whether the computation kept its promise, the third whether the promise was the
right one: an objective that does not know of the compressed inputs promises less than it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from spectrim.data.windows import Windows
from spectrim.errors import InputError
from spectrim.evaluate.distortion import BLOCK, Distortion, distortion_by_depth
from spectrim.model.anatomy import Anatomy
from spectrim.recipe import Recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.texts import UserText
from spectrim.studies.reference import PointStore, result_key
from spectrim.studies.running import run_on_copy


@dataclass(frozen=True)
class LayerError:
    """The errors of one target of one result; see above.

    Attributes:
        model: the name that was given to the result.
        block: index of the block.
        projection: path inside the block.
        predicted: None where the run did not say.
        calibrated: None where the run did not say.
        held_out: on the evaluation text.
    """

    model: str
    block: int
    projection: str
    predicted: float | None
    calibrated: float | None
    held_out: float

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class DepthRun:
    """One result along depth.

    Attributes:
        name: of the result.
        keep: achieved, None where no report says so.
        distortion: of blocks and targets, in the order of depth.
        errors: of the targets.
    """

    name: str
    keep: float | None
    distortion: list[Distortion]
    errors: list[LayerError]

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "name": self.name,
            "keep": self.keep,
            "distortion": [one.record() for one in self.distortion],
            "errors": [one.record() for one in self.errors],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DepthRun:
        """What `record` wrote.

        Raises:
            InputError: something is missing or of another kind.
        """
        try:
            return cls(
                str(record["name"]),
                record["keep"],
                [Distortion(**one) for one in record["distortion"]],
                [LayerError(**one) for one in record["errors"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"a result along depth lacks a value: {error}") from error


def follow(
    name: str,
    dense: LoadedModel,
    compressed: nn.Module,
    report: Mapping[str, Any],
    windows: Windows,
    anatomy: Anatomy,
    *,
    batch: int = 8,
) -> DepthRun:
    """Follow both networks through their blocks.

    Args:
        name: of the result, in tables and pictures.
        dense: the original.
        compressed: the result in memory.
        report: of its run, empty where there is none.
        windows: to measure on.
        anatomy: the original's.
        batch: windows per forward pass.
    """
    found = distortion_by_depth(
        dense.model, {name: compressed}, windows, batch=batch, anatomy=anatomy
    )
    told = {t["name"]: t for t in report.get("targets", [])}
    names = {(t.block, t.projection): t.name for t in anatomy.targets}
    errors = []
    for one in found:
        if one.projection != BLOCK:
            facts = told.get(names[one.block, one.projection], {})
            pair = facts.get("predicted_error"), facts.get("measured_error")
            errors.append(LayerError(name, one.block, one.projection, *pair, one.relative))
    return DepthRun(name, report.get("keep", {}).get("achieved"), found, errors)


def run_along_depth(
    dense: LoadedModel,
    recipe: Recipe,
    windows: Windows,
    anatomy: Anatomy,
    *,
    text: UserText = None,
    batch: int = 8,
    store: PointStore | None = None,
) -> DepthRun:
    """Compress a copy with a recipe and follow it along depth; finished runs come from `store`.

    Raises:
        SpectrimError: the recipe cannot be run on this model or text.
    """
    store = store or PointStore(None)
    key = result_key(recipe, dense, windows, text, kind="depth")
    known = store.read(key)
    if known is not None:
        try:
            return DepthRun.from_record(known)
        except InputError:
            # A damaged cache costs time, never a result: it is measured again.
            pass
    outcome = run_on_copy(dense, recipe, text=text)
    run = follow(recipe.name, dense, outcome.model, outcome.report, windows, anatomy, batch=batch)
    store.write(key, run.record())
    return run

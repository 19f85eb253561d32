"""From a finished run to its folder: provenance, card, recipe and report beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectrim.allocate.budget import format_bytes
from spectrim.recipe import Recipe
from spectrim.run.compress import Outcome
from spectrim.run.healing import Healed
from spectrim.run.store.saving_elastic import save_elastic_outcome
from spectrim.storage.attach import attach
from spectrim.storage.card import Card
from spectrim.storage.folder import RECIPE_FILE, Papers, save_model
from spectrim.storage.origin import HUB_ID, Origin, read_origin
from spectrim.storage.paths import last_part
from spectrim.storage.table import Provenance


def save_outcome(
    outcome: Outcome,
    output: str | Path,
    *,
    overwrite: bool = False,
    original: str | Path | None = None,
) -> None:
    """Write the compressed model as a Hugging Face folder; the report gains the recounted bytes.

    An outcome with an elastic artifact is written as that: every size instead of one.

    Args:
        outcome: of a run.
        output: the folder.
        overwrite: replace what is there.
        original: the base checkpoint, to be included in an elastic artifact.

    Raises:
        OutputError: the destination is taken or cannot be written; nothing is left there.
    """
    recipe, report = outcome.recipe, outcome.report
    if outcome.elastic is not None:
        save_elastic_outcome(outcome, output, overwrite=overwrite, original=original)
        return
    describe_outcome(outcome)
    inspection = save_model(
        outcome.model,
        outcome.tokenizer,
        output,
        _papers(report, recipe, read_origin(report["model"])),
        overwrite=overwrite,
        read=None if outcome.onloader is None else outcome.onloader.tensor,
    )
    report["stored"] = inspection.summary()


def describe_outcome(outcome: Outcome) -> None:
    """Give the model of an outcome its configuration, so that `save_pretrained` of it is a result.

    Without it transformers would save compressed layers that no class of its own can hold, and
    fill what it does not find with random numbers when it loads them.
    """
    if outcome.elastic is not None:
        return
    recipe = outcome.recipe
    attach(
        outcome.model,
        left_dense=[
            e.name for e in outcome.plan.entries if e.rank is None and e.weights == "native"
        ],
        provenance=Provenance(
            recipe=recipe.name,
            recipe_hash=recipe.hash(),
            keep=recipe.keep,
            base_model=outcome.report["model"],
        ),
    )


def save_healed(healed: Healed, source: str | Path, output: str | Path, *, overwrite: bool) -> None:
    """Write a result that was trained further; recipe, license and provenance are its own.

    Args:
        healed: the trained result.
        source: the folder that it was loaded from.
        output: the folder.
        overwrite: replace what is there.

    Raises:
        OutputError: the destination is taken or cannot be written; nothing is left there.
    """
    base = healed.report["model"]
    own = read_origin(source)
    origin = replace(own, hub_id=base if HUB_ID.fullmatch(base) else None)
    recipe = Recipe.from_file(Path(source) / RECIPE_FILE)
    inspection = save_model(
        healed.model,
        healed.tokenizer,
        output,
        _papers(healed.report, recipe, origin),
        overwrite=overwrite,
    )
    healed.report["stored"] = inspection.summary()


def _papers(report: Mapping[str, Any], recipe: Recipe, origin: Origin) -> Papers:
    keep = report["keep"]
    pairs = {
        "target layers": keep["target_bytes"],
        "whole model": keep["model_bytes"],
    }
    numbers = {
        name: (format_bytes(pair["dense"]), format_bytes(pair["stored"]))
        for name, pair in pairs.items()
    }
    numbers["kept share of the target layers"] = ("1", f"{keep['achieved']:.4f}")
    calibration = report["calibration"]
    protocol = (
        f"Calibrated on {calibration['windows']} windows of {calibration['window_length']} tokens "
        f"of {', '.join(calibration['sources'])}, seed {calibration['seed']}."
        if calibration
        else "No calibration data was used."
    )
    base = report["model"]
    card = Card(
        f"{last_part(base)} at keep {recipe.keep:g}",
        base_model=base,
        recipe_name=recipe.name,
        recipe_yaml=recipe.to_yaml(),
        numbers=numbers,
        protocol=protocol,
        notes=report["notes"],
        origin=origin,
        outside=(report.get("outside_budget") or {}).get("words", ""),
        measured=(report.get("measured") or {}).get("texts", []),
    )
    return Papers(recipe.to_yaml(), report, card.text(), origin.files)

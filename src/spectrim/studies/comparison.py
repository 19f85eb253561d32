"""Recipes side by side at equal sizes: one table with uncertainty, seconds and honest peak memory.

Every compression runs in a process of its own, since the peak memory of one run cannot be told
from what earlier ones left behind. What is measured is the saved result, as its user loads it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.errors import InputError, SpectrimError
from spectrim.evaluate.bootstrap import perplexity_difference
from spectrim.evaluate.perplexity import Perplexity
from spectrim.evaluate.points import CurvePoint, parse_keeps
from spectrim.recipe import Recipe
from spectrim.report.tables import comparison_csv, comparison_markdown
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.run.reporting import environment
from spectrim.run.resolving import resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.texts import own_text
from spectrim.storage.json_file import as_json, read_json
from spectrim.storage.whole_file import write_text
from spectrim.studies.files import open_study
from spectrim.studies.measure import Measure, different_names, measured_on
from spectrim.studies.reference import Measured, PointStore, Reference, Size


@dataclass(frozen=True)
class Entry:
    """One row: a point and how it stands to the best of its size.

    Attributes:
        point: the numbers.
        best: whether its perplexity is the lowest of its size.
        within_noise: whether its loss cannot be told from the best one's by a paired bootstrap
            (95 %); None where there are too few windows to say.
    """

    point: CurvePoint
    best: bool
    within_noise: bool | None

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**self.point.record(), "best": self.best, "within_noise": self.within_noise}


@dataclass
class Comparison:
    """The table.

    Attributes:
        dense: numbers and protocol of the dense model.
        entries: sizes outermost, recipes in the order asked for.
        failed: `recipe keep` -> the error that its run ended with.
    """

    dense: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "format_version": 1,
            "dense": self.dense,
            "entries": [entry.record() for entry in self.entries],
            "failed": self.failed,
            "environment": environment(),
        }


def compare_recipes(
    reference: Reference,
    recipes: Sequence[Recipe],
    keeps: Sequence[float],
    *,
    options: Sequence[str] = (),
    store: PointStore | None = None,
) -> Comparison:
    """Run every recipe at every size, each in its own process, and compare the results.

    A run that fails is named with its error and the others go on.

    Args:
        reference: the dense model, loaded by name or from a folder.
        recipes: resolved, calibration text included.
        keeps: sizes, fractions in (0, 1].
        options: further options of `spectrim compress`, e.g. a device.
        store: finished runs.

    Raises:
        InputError: the model is an object, which no other process can load; every run failed.
    """
    store, progress = store or PointStore(None), reference.progress
    found: dict[float, list[Measured]] = {keep: [] for keep in keeps}
    table = Comparison(reference.dense_record())
    stage = "compare"
    progress.start(stage, len(recipes) * len(keeps))
    for keep in keeps:
        for recipe in (r.with_changes(keep=keep) for r in recipes):
            note = f"{recipe.name} {keep:g}"
            try:
                found[keep].append(_run(reference, recipe, options, store))
            except SpectrimError as error:
                table.failed[note] = str(error)
            progress.advance(stage, note)
    progress.finish(stage)
    for runs in found.values():
        table.entries += _ranked(runs, reference)
    if not table.entries:
        name, reason = next(iter(table.failed.items()))
        raise InputError(f"no run succeeded; {name} was the first: {reason}")
    return table


def _run(
    reference: Reference, recipe: Recipe, options: Sequence[str], store: PointStore
) -> Measured:
    key = store.key(recipe, reference, None, alone=True)
    known = store.find(key)
    if known is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="spectrim-compare-") as scratch:
        output = Path(scratch) / "result"
        _compress_alone(reference.loaded.name, recipe, output, options)
        report = read_json(output / "spectrim_report.json")
        beside = next(reference.loaded.model.parameters())
        loaded = load_model(output, RunOptions(device=beside.device, dtype=beside.dtype))
        measured = reference.measure(
            loaded.model,
            Size.from_report(report, alone=True),
            recipe=recipe.name,
            seconds=sum(report["seconds"].values()),
        )
    store.keep(key, measured)
    return measured


def _compress_alone(model: str, recipe: Recipe, output: Path, options: Sequence[str]) -> None:
    """`spectrim compress` in its own process; its error line becomes an error here."""
    settings = output.with_name("recipe.yaml")
    settings.write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "spectrim", "compress", model, "--recipe", str(settings)]
    command += ["--output", str(output), "--quiet", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(lines[-1].removeprefix("error: "))


def _ranked(runs: Sequence[Measured], reference: Reference) -> list[Entry]:
    if not runs:
        return []
    best = min(runs, key=lambda run: run.point.nll)
    return [
        Entry(run.point, run is best, run is best or _within_noise(run, best, reference))
        for run in runs
    ]


def _within_noise(run: Measured, best: Measured, reference: Reference) -> bool | None:
    if len(run.per_window_nll) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    pair = (_as_perplexity(one, reference) for one in (run, best))
    return perplexity_difference(*pair, generator=generator).within_noise


def _as_perplexity(run: Measured, reference: Reference) -> Perplexity:
    return Perplexity(
        nll=run.point.nll,
        tokens=reference.perplexity.tokens,
        perplexity=run.point.perplexity,
        per_window_nll=torch.tensor(run.per_window_nll, dtype=torch.float64),
        protocol=reference.perplexity.protocol,
    )


def compare(
    model: str | Path,
    *,
    recipes: Sequence[str | Path | Recipe],
    keep: str | Sequence[float] = (0.8, 0.6, 0.4),
    measure: Measure | None = None,
    output: str | Path | None = None,
    **calibration: Any,
) -> Comparison:
    """Recipes side by side at equal sizes, each run in a process of its own.

    Args:
        model: a hub name or a folder.
        recipes: to compare.
        keep: sizes.
        measure: evaluation text and its protocol.
        output: folder for `compare.md`, `.csv`, `.json` and the finished runs.
        **calibration: `text` (names or files), `windows`, `window_length`, `seed`, `storage`,
            `weights` as in `spectrim.compress`.

    Raises:
        SpectrimError: unknown recipes, texts or models; every run failed.
    """
    if isinstance(model, nn.Module):
        raise InputError("compare runs each recipe in its own process; give a folder or hub name")
    if not recipes:
        raise InputError("compare needs recipes, for example svd-llm,aa-svd")
    if own_text(calibration.get("text")) is not None:
        raise InputError("compare runs in other processes; give the text as names or files")
    measure = measured_on(measure, calibration.get("text"))
    keeps = parse_keeps(keep) if isinstance(keep, str) else list(keep)
    resolved = different_names([resolve_recipe(r, **calibration) for r in recipes])
    folder, store = open_study(
        output,
        writes=[f"compare.{kind}" for kind in ("json", "csv", "md")],
        sources=sources_of(model=model, text=[calibration.get("text"), measure.text]),
    )
    options = ["--device", str(measure.options.device)]
    options += ["--trust-remote-code"] if measure.options.trust_remote_code else []
    found = compare_recipes(
        measure.reference(model),
        resolved,
        keeps,
        options=options,
        store=store,
    )
    if folder is not None:
        record = found.record()
        write_text(folder / "compare.json", as_json(record))
        write_text(folder / "compare.csv", comparison_csv(record))
        write_text(folder / "compare.md", comparison_markdown(record))
    return found

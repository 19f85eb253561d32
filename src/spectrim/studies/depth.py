"""Where along the depth several results depart from their original, with tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectrim.arguments import refuse_unused
from spectrim.decompose import OBJECTIVES
from spectrim.errors import InputError
from spectrim.evaluate.distortion import Distortion, distortion_rows
from spectrim.model.tracing import trace
from spectrim.recipe import Recipe
from spectrim.report.content import REPORT_FILE, read_result
from spectrim.report.drawing import new_figure
from spectrim.report.figures import draw_depth
from spectrim.report.study_figures import draw_layer_errors, shown_projections
from spectrim.report.tables import rows_csv
from spectrim.run.loading import load_model
from spectrim.run.reporting import environment
from spectrim.run.resolving import resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.texts import own_text, vocabulary_size
from spectrim.storage.json_file import as_json
from spectrim.storage.whole_file import write_text
from spectrim.studies.files import open_study, save_pictures
from spectrim.studies.following import DepthRun, LayerError, follow, run_along_depth
from spectrim.studies.measure import Measure
from spectrim.studies.reference import PointStore

PUBLISHED_OBJECTIVES = ("plain", "whitened", "shifted", "anchored")
"""The four objectives of AA-SVD (arXiv 2604.02119), in its order."""

STAGE = "depth"


def objective_recipe(objective: str) -> Recipe:
    """A recipe that differs from others only in its objective: block by block, equal ranks.

    Raises:
        InputError: no such objective.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"no objective is called {objective!r}; use {', '.join(OBJECTIVES)}")
    return resolve_recipe("aa-svd").with_changes(
        name=objective, decompose={"objective": objective}, refine=[]
    )


def distortion(
    model: str | Path,
    results: Sequence[str | Path] = (),
    *,
    measure: Measure | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> list[Distortion]:
    """Distance of every block's and target's output from the original's, for several results.

    Args:
        model: the dense model.
        results: folders of compressed models; named by their last part.
        measure: text and protocol.
        output: folder for `distortion.json`, `.csv`, and `mse` and `cosine` as `.png` and `.svg`,
            and for the finished runs of recipes, which a later call takes up again.
        **options: recipes to run and follow, as in `layer_errors`.

    Raises:
        SpectrimError: no results, two of one name, or models that cannot be compared.
    """
    writes = ["distortion.json", "distortion.csv", "mse.png", "mse.svg", "cosine.png", "cosine.svg"]
    folder, store = _open(output, writes, model, results, measure, options)
    record, runs = _follow_all(model, results, measure, store, **options)
    found = [one for run in runs for one in run.distortion]
    if folder is not None:
        record["distortion"] = [one.record() for one in found]
        write_text(folder / "distortion.json", as_json(record))
        write_text(folder / "distortion.csv", rows_csv(distortion_rows(found)))
        for name in ("mse", "cosine"):
            with new_figure() as (figure, axes):
                draw_depth(axes, found, measure=name)
                save_pictures(figure, folder / name)
    return found


def layer_errors(
    model: str | Path,
    results: Sequence[str | Path] = (),
    *,
    measure: Measure | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> list[LayerError]:
    """Predicted and measured error of every target, for several objectives, recipes or results.

    Args:
        model: the dense model.
        results: folders of compressed models; named by their last part.
        measure: text and protocol.
        output: folder for `layer_errors.json`, `.csv`, `.png` and `.svg`, and for the finished
            runs, which a later call takes up again.
        **options: `recipes` and `objectives` to run and follow, at the size `keep`; `text`,
            `windows`, `window_length`, `seed` as in `spectrim.compress`.

    Raises:
        SpectrimError: no results, two of one name, or models that cannot be compared.
    """
    writes = [f"layer_errors.{kind}" for kind in ("json", "csv", "png", "svg")]
    folder, store = _open(output, writes, model, results, measure, options)
    record, runs = _follow_all(model, results, measure, store, **options)
    found = [one for run in runs for one in run.errors]
    if folder is not None:
        record["errors"] = [one.record() for one in found]
        write_text(folder / "layer_errors.json", as_json(record))
        write_text(folder / "layer_errors.csv", rows_csv([one.record() for one in found]))
        panels = len(shown_projections(found)) + 1
        columns = min(4, panels)
        rows = math.ceil(panels / columns)
        size = {"width": 2.7 * columns, "height": 2.4 * rows}
        with new_figure(**size, nrows=rows, ncols=columns, squeeze=False) as (figure, axes):
            draw_layer_errors(list(axes.flat), found)
            save_pictures(figure, folder / "layer_errors")
    return found


def _report_of(result: str | Path) -> Mapping[str, Any]:
    """The report of a result; empty for a model that no run of ours has made."""
    if not (Path(result) / REPORT_FILE).is_file():
        return {}
    return read_result(result).report


def _open(
    output: str | Path | None,
    writes: Sequence[str],
    model: str | Path,
    results: Sequence[str | Path],
    measure: Measure | None,
    options: Mapping[str, Any],
) -> tuple[Path | None, PointStore]:
    texts = [options.get("text"), None if measure is None else measure.text]
    read = sources_of(model=model, result=list(results), text=texts)
    return open_study(output, writes=writes, sources=read)


def _follow_all(
    model: str | Path,
    results: Sequence[str | Path],
    measure: Measure | None,
    store: PointStore,
    *,
    recipes: Sequence[str | Path | Recipe] = (),
    objectives: Sequence[str] = (),
    keep: float | None = None,
    **calibration: Any,
) -> tuple[dict[str, Any], list[DepthRun]]:
    """What both studies record, and every result and recipe followed along depth."""
    measure = measure or Measure()
    progress = measure.options.progress
    chosen = [objective_recipe(name) for name in objectives]
    resolved = [resolve_recipe(one, keep=keep, **calibration) for one in (*chosen, *recipes)]
    if not resolved:
        given = {"keep": keep, **{k: v for k, v in calibration.items() if k != "text"}}
        refuse_unused("it is for runs, and no recipes or objectives are named", given)
    folders = {Path(result).name or str(result): result for result in results}
    names = [*folders, *(recipe.name for recipe in resolved)]
    if not names or len(folders) < len(results) or len(set(names)) < len(names):
        raise InputError(
            "expected results, recipes or objectives with different names, found "
            + (", ".join([*(str(r) for r in results), *(r.name for r in resolved)]) or "none")
        )
    reports = {name: _report_of(result) for name, result in folders.items()}
    dense = load_model(model, measure.options)
    windows = measure.windows(dense)
    place = next(dense.model.parameters()).device
    first = torch.arange(8, device=place)[None] % vocabulary_size(dense.model)
    anatomy, batch = trace(dense.model, first), measure.batch
    progress.start(STAGE, len(names))
    runs = []
    for name, result in folders.items():
        compressed = load_model(result, measure.options).model
        found = follow(name, dense, compressed, reports[name], windows, anatomy, batch=batch)
        runs.append(found)
        progress.advance(STAGE, name)
    more = {"text": own_text(calibration.get("text")), "batch": batch, "store": store}
    for recipe in resolved:
        runs.append(run_along_depth(dense, recipe, windows, anatomy, **more))
        progress.advance(STAGE, recipe.name)
    progress.finish(STAGE)
    record = {
        "format_version": 1,
        "model": dense.name,
        "keep": {run.name: run.keep for run in runs},
        "protocol": windows.record(),
        "environment": environment(),
    }
    return record, runs

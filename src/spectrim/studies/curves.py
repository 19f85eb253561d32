"""The rate-distortion curve of a model or an elastic artifact, with its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.arguments import refuse_unused
from spectrim.errors import InputError
from spectrim.evaluate.points import curve_csv, parse_keeps
from spectrim.recipe import Recipe
from spectrim.report.drawing import new_figure
from spectrim.report.figures import draw_curve
from spectrim.run.resolving import resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.texts import own_text
from spectrim.storage.json_file import as_json
from spectrim.storage.whole_file import write_text
from spectrim.studies.files import open_study, save_pictures
from spectrim.studies.measure import Measure, different_names, measured_on
from spectrim.studies.opening import dense_twin, has_every_size, open_sizes
from spectrim.studies.rates import RateCurve, elastic_curve, recipe_curve
from spectrim.studies.reference import PointStore


def curve(
    model: str | Path | nn.Module,
    *,
    recipes: Sequence[str | Path | Recipe] = (),
    keep: str | Sequence[float] = "0.9..0.3",
    formats: Sequence[str] = (),
    measure: Measure | None = None,
    output: str | Path | None = None,
    **calibration: Any,
) -> RateCurve:
    """The rate-distortion curve of a model, or of an elastic artifact.

    Args:
        model: a hub name, a folder, a model object, or the folder of an elastic artifact.
        recipes: to draw one line each; none for an artifact, whose sizes need no recipe.
        keep: sizes: a list, or text that `parse_keeps` reads.
        formats: `int8`, `int4`: reference points of the dense model in these number formats.
        measure: evaluation text and its protocol.
        output: folder for `curve.json`, `.csv`, `.png`, `.svg` and the finished points, which a
            later call takes up again.
        **calibration: `text`, `windows`, `window_length`, `seed`, `storage`, `weights` as in
            `spectrim.compress`.

    Raises:
        SpectrimError: unknown recipes, texts or models; sizes that no recipe reaches.
    """
    measure = measured_on(measure, calibration.get("text"))
    keeps = parse_keeps(keep) if isinstance(keep, str) else list(keep)
    resolved = different_names([resolve_recipe(r, **calibration) for r in recipes])
    texts = [calibration.get("text"), measure.text]
    folder, store = open_study(
        output,
        writes=[f"curve.{kind}" for kind in ("json", "csv", "png", "svg")],
        sources=sources_of(artifact=model, text=texts)
        if has_every_size(model)
        else sources_of(model=model, text=texts),
    )
    if has_every_size(model):
        if recipes:
            raise InputError(f"{model} is an elastic artifact and has its sizes; give no recipes")
        refuse_unused("an elastic artifact was calibrated when it was made", calibration)
        found = _elastic(Path(str(model)), keeps, formats, measure, store)
    else:
        if not recipes:
            raise InputError("a curve needs recipes, for example svd-llm,aa-svd")
        found = recipe_curve(
            measure.reference(model),
            resolved,
            keeps,
            text=own_text(calibration.get("text")),
            formats=formats,
            store=store,
        )
    if folder is not None:
        write_text(folder / "curve.json", as_json(found.record()))
        write_text(folder / "curve.csv", curve_csv(found.points))
        with new_figure(width=7.2, height=4.4) as (figure, axes):
            draw_curve(axes, found.points)
            save_pictures(figure, folder / "curve")
    return found


def _elastic(
    folder: Path,
    keeps: Sequence[float],
    formats: Sequence[str],
    measure: Measure,
    store: PointStore,
) -> RateCurve:
    elastic = open_sizes(folder, measure)
    # As its device and dtype are now.
    here = replace(measure.options, device="auto", dtype="auto", tokenizer=elastic.tokenizer)
    reference = replace(measure, options=here).reference(dense_twin(elastic.model))
    reference.loaded.stored_dtype = elastic.elastic.dtype
    return elastic_curve(
        reference,
        elastic,
        keeps,
        name=folder.resolve().name,
        formats=formats,
        store=store,
    )

"""Studies over several runs, with their files: curve, comparison, distortion along depth, page."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spectrim.api import ElasticModel, load_elastic, resolve_recipe
from spectrim.errors import InputError, OutputError
from spectrim.evaluate.curve import curve_csv, parse_keeps
from spectrim.evaluate.perplexity import perplexity
from spectrim.recipe import Recipe
from spectrim.report.content import as_json, read_curve_file
from spectrim.report.drawing import new_figure, save_figure
from spectrim.report.figures import draw_curve
from spectrim.report.page import render_page
from spectrim.report.tables import comparison_csv, comparison_markdown
from spectrim.run.compare import Comparison, compare_recipes
from spectrim.run.curve import Curve, elastic_curve, recipe_curve
from spectrim.run.evaluating import evaluation_windows_of
from spectrim.run.job import Progress
from spectrim.run.loading import LoadedModel
from spectrim.run.measuring import PointStore, Reference, open_reference
from spectrim.run.page import gather_page
from spectrim.run.texts import UserText
from spectrim.slider.engine import Engine
from spectrim.slider.server import SliderServer
from spectrim.storage.elastic import is_elastic
from spectrim.storage.survey_file import is_survey

__all__ = ["Measure", "compare", "curve", "report", "slider"]

POINTS_FOLDER = "points"


@dataclass(frozen=True)
class Measure:
    """How the models of a study are measured.

    Attributes:
        text: evaluation text, None for wikitext2.
        window_length: tokens per window; None for 2048 or the model's longest, or `max`.
        max_tokens: score at most this many tokens.
        batch: windows per forward pass.
        device: `auto` or a torch device.
        dtype: `auto` is fp32 on a CPU.
        trust_remote_code: run code that comes with the checkpoint.
    """

    text: UserText = None
    window_length: int | Literal["max"] | None = None
    max_tokens: int | None = None
    batch: int = 8
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    trust_remote_code: bool = False

    def reference(self, model: str | Path | nn.Module, tokenizer: Any = None) -> Reference:
        """The dense model, loaded and measured."""
        return open_reference(model, tokenizer=tokenizer, **vars(self))


def curve(
    model: str | Path | nn.Module,
    *,
    recipes: Sequence[str | Path | Recipe] = (),
    keep: str | Sequence[float] = "0.9..0.3",
    measure: Measure | None = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **calibration: Any,
) -> Curve:
    """The rate-distortion curve of a model, or of an elastic artifact.

    Args:
        model: a hub name, a folder, a model object, or the folder of an elastic artifact.
        recipes: to draw one line each; none for an artifact, whose sizes need no recipe.
        keep: sizes: a list, or text that `parse_keeps` reads.
        measure: evaluation text and its protocol.
        output: folder for `curve.json`, `.csv`, `.png`, `.svg` and the finished points, which a
            later call takes up again.
        tokenizer: for model objects.
        progress: told of every point.
        **calibration: `text`, `windows`, `window_length`, `seed`, `storage`, `weights` as in
            `spectrim.compress`.

    Raises:
        SpectrimError: unknown recipes, texts or models; sizes that no recipe reaches.
    """
    measure = measure or Measure()
    keeps = parse_keeps(keep) if isinstance(keep, str) else list(keep)
    folder = None if output is None else _folder(output)
    if _is_elastic(model):
        if recipes:
            raise InputError(f"{model} is an elastic artifact and has its sizes; give no recipes")
        found = _elastic(Path(str(model)), keeps, measure, progress)
    else:
        if not recipes:
            raise InputError("a curve needs recipes, for example svd-llm,aa-svd")
        resolved = [resolve_recipe(recipe, **calibration) for recipe in recipes]
        found = recipe_curve(
            measure.reference(model, tokenizer),
            resolved,
            keeps,
            text=_own_text(calibration.get("text")),
            store=PointStore(None if folder is None else folder / POINTS_FOLDER),
            progress=progress,
        )
    if folder is not None:
        _write(folder / "curve.json", as_json(found.record()))
        _write(folder / "curve.csv", curve_csv(found.points))
        with new_figure(width=7.2, height=4.4) as (figure, axes):
            draw_curve(axes, found.points)
            for suffix in ("png", "svg"):
                save_figure(figure, folder / f"curve.{suffix}")
    return found


def _own_text(text: UserText) -> UserText:
    """Text that a recipe cannot name: documents and token windows."""
    return None if isinstance(text, str | Path) else text


def _is_elastic(model: str | Path | nn.Module) -> bool:
    return not isinstance(model, nn.Module) and (is_elastic(model) or is_survey(model))


def _open(folder: Path, measure: Measure) -> ElasticModel:
    return load_elastic(
        folder,
        device=str(measure.device),
        dtype=str(measure.dtype).removeprefix("torch."),
        trust_remote_code=measure.trust_remote_code,
    )


def _elastic(
    folder: Path, keeps: Sequence[float], measure: Measure, progress: Progress | None
) -> Curve:
    elastic = _open(folder, measure)
    reference = replace(measure, device="auto", dtype="auto").reference(
        dense_twin(elastic.model), elastic.tokenizer
    )
    reference.loaded.stored_dtype = elastic.elastic.dtype
    return elastic_curve(reference, elastic, keeps, name=folder.name, progress=progress)


def dense_twin(model: nn.Module) -> nn.Module:
    """A second tree of modules over the same tensors: it stays dense while the first is resized."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def slider(
    artifact: str | Path,
    *,
    measure: Measure | None = None,
    curve: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> SliderServer:
    """The slider's server, ready for `serve_forever`.

    Args:
        artifact: the folder of an elastic artifact or a survey.
        measure: with a text, the page shows perplexities.
        curve: what `spectrim curve` wrote for this artifact and text, for estimates.
        host: address to listen on.
        port: 0 takes any free one.

    Raises:
        SpectrimError: the artifact cannot be loaded, or the address is taken.
    """
    measure = measure or Measure()
    if not _is_elastic(artifact):
        raise InputError(
            f"{artifact} is neither an elastic artifact nor a survey; make one with "
            "`spectrim compress --recipe acip` or `spectrim survey`"
        )
    elastic = _open(Path(artifact), measure)
    dense = dense_twin(elastic.model)
    windows, known = None, {}
    if measure.text is not None:
        loaded = LoadedModel(dense, elastic.tokenizer, str(artifact), elastic.elastic.dtype)
        windows = evaluation_windows_of(
            loaded, measure.text, measure.window_length, measure.max_tokens
        )
        known[1.0] = perplexity(dense, windows, batch=measure.batch).perplexity
        if curve is not None:
            known |= {p.achieved: p.perplexity for p in read_curve_file(curve)}
    engine = Engine(
        name=Path(artifact).name,
        dense=dense,
        elastic=elastic,
        tokenizer=elastic.tokenizer,
        smallest_keep=elastic.sizes.smallest_keep,
        other_bytes=elastic.elastic.base.other_bytes,
        windows=windows,
        known=known,
    )
    return SliderServer(engine, host=host, port=port)


def compare(
    model: str | Path,
    *,
    recipes: Sequence[str | Path | Recipe],
    keep: str | Sequence[float] = (0.8, 0.6, 0.4),
    measure: Measure | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **calibration: Any,
) -> Comparison:
    """Recipes side by side at equal sizes, each run in a process of its own.

    Args:
        model: a hub name or a folder.
        recipes: to compare.
        keep: sizes.
        measure: evaluation text and its protocol.
        output: folder for `compare.md`, `.csv`, `.json` and the finished runs.
        progress: told of every run.
        **calibration: `text` (names or files), `windows`, `window_length`, `seed`, `storage`,
            `weights` as in `spectrim.compress`.

    Raises:
        SpectrimError: unknown recipes, texts or models; every run failed.
    """
    if isinstance(model, nn.Module):
        raise InputError("compare runs each recipe in its own process; give a folder or hub name")
    if not recipes:
        raise InputError("compare needs recipes, for example svd-llm,aa-svd")
    if _own_text(calibration.get("text")) is not None:
        raise InputError("compare runs in other processes; give the text as names or files")
    measure = measure or Measure()
    keeps = parse_keeps(keep) if isinstance(keep, str) else list(keep)
    resolved = [resolve_recipe(recipe, **calibration) for recipe in recipes]
    folder = None if output is None else _folder(output)
    options = ["--device", str(measure.device)]
    options += ["--trust-remote-code"] if measure.trust_remote_code else []
    found = compare_recipes(
        measure.reference(model),
        resolved,
        keeps,
        options=options,
        store=PointStore(None if folder is None else folder / POINTS_FOLDER),
        progress=progress,
    )
    if folder is not None:
        record = found.record()
        _write(folder / "compare.json", as_json(record))
        _write(folder / "compare.csv", comparison_csv(record))
        _write(folder / "compare.md", comparison_markdown(record))
    return found


def report(
    folder: str | Path, *, output: str | Path, overwrite: bool = False, **options: Any
) -> Path:
    """Write the HTML page of a result; `options` as in `run.page.gather_page`.

    Raises:
        SpectrimError: the page exists, or something asked for cannot be read or measured.
    """
    path = Path(output)
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists; choose another file or pass --overwrite")
    _write(path, render_page(gather_page(folder, **options)))
    return path


def _folder(output: str | Path) -> Path:
    """The folder of a study; one that exists is taken up again."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}") from error
    return folder


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error

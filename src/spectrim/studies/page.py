"""Gather what a report page shows: the folder's own record and, beside the dense model, more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectrim.arguments import refuse_unused
from spectrim.data.windows import Windows
from spectrim.errors import InputError, OutputError, TextError
from spectrim.evaluate.agreement import agreement
from spectrim.evaluate.distortion import distortion_by_depth
from spectrim.evaluate.perplexity import perplexity
from spectrim.evaluate.samples import continuations
from spectrim.report.content import PageContent, read_curve_file, read_result
from spectrim.report.page import PAGE_MARK, render_page
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.sources import sources_of
from spectrim.storage.ownership import check_apart
from spectrim.storage.survey_file import load_survey
from spectrim.storage.whole_file import check_file, write_text
from spectrim.studies.measure import Measure

PROMPTS = ("The old house stood at the end of the lane, and",)
_DEPTH_WINDOWS = 8


def gather_page(
    folder: str | Path,
    measure: Measure = Measure(),
    *,
    against: str | Path | None = None,
    others: Sequence[str | Path] = (),
    curve: str | Path | None = None,
    survey: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> PageContent:
    """Everything for the page of one result.

    Args:
        folder: a result folder.
        measure: how models are loaded, and on which text they are measured.
        against: the dense model; with it both are measured, followed along depth and sampled.
        others: further results to draw along depth.
        curve: folder or file that `spectrim curve` wrote.
        survey: folder that `spectrim survey` wrote, for spectra.
        prompts: to be continued by both models.

    Raises:
        SpectrimError: something that was asked for cannot be read or measured.
    """
    content = read_result(folder)
    if curve is not None:
        content = replace(content, curve=read_curve_file(curve))
    if survey is not None:
        content = replace(content, spectra=_spectra(survey))
    if against is None:
        if others:
            raise InputError("drawing other results along depth needs the dense model: against")
        given = {name: getattr(measure, name) for name in ("text", "window_length", "max_tokens")}
        refuse_unused("nothing is measured without the dense model, against", given)
        if tuple(prompts) != PROMPTS:
            refuse_unused("both models continue them, which needs against", {"prompts": prompts})
        return content
    dense = load_model(against, measure.options)
    models = {_label(name): load_model(name, measure.options) for name in (folder, *others)}
    if len(models) <= len(others):
        raise InputError(f"two results have the same folder name, one of {', '.join(models)}")
    windows = measure.windows(dense)
    return replace(
        content,
        evaluations=_evaluations(dense, {_label(against): dense, **models}, windows),
        depth=distortion_by_depth(
            dense.model,
            {name: loaded.model for name, loaded in models.items()},
            windows.take(min(_DEPTH_WINDOWS, len(windows))),
        ),
        samples=_samples(dense, {"dense": dense, **models}, prompts),
    )


def _evaluations(
    dense: LoadedModel, models: dict[str, LoadedModel], windows: Windows
) -> list[dict[str, Any]]:
    """What every model scores on the windows, and the others beside the dense one."""
    source = windows.sources[0]
    evaluations = []
    for name, loaded in models.items():
        record: dict[str, Any] = {
            "model": name,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "perplexity": {source: perplexity(loaded.model, windows).record()},
        }
        if loaded is not dense:
            record["agreement"] = {source: agreement(dense.model, loaded.model, windows).record()}
        evaluations.append(record)
    return evaluations


def _label(name: str | Path) -> str:
    """What a model is called in tables: the last part of its path."""
    return Path(name).name or str(name)


def _samples(dense: LoadedModel, models: dict[str, LoadedModel], prompts: Sequence[str]):
    if dense.tokenizer is None:
        return ()
    empty = [prompt for prompt in prompts if not prompt.strip()]
    if empty:
        raise TextError("a prompt is empty; give at least one word")
    return continuations(
        {name: loaded.model for name, loaded in models.items()}, dense.tokenizer, list(prompts)
    )


def _spectra(folder: str | Path) -> dict[str, list[float]]:
    """Energies of every target of a survey, by target."""
    survey = load_survey(folder)
    return {c.name: [float(e) for e in c.energy] for c in survey.curves if c.energy is not None}


def report(
    folder: str | Path,
    measure: Measure = Measure(),
    *,
    output: str | Path,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write the HTML page of a result; `options` as in `gather_page`.

    Raises:
        SpectrimError: the page exists, or something asked for cannot be read or measured.
    """
    read = sources_of(
        result=[folder, *options.get("others", ())],
        model=options.get("against"),
        curve=options.get("curve"),
        survey=options.get("survey"),
        text=measure.text,
    )
    check_apart(output, read)
    path = check_file(output, overwrite=overwrite, option="FILE")
    if path.exists() and PAGE_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise OutputError(f"{path} is no page of spectrim and is not replaced; choose another FILE")
    write_text(path, render_page(gather_page(folder, measure, **options)))
    return path

"""The slider's server for an elastic artifact or a survey."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from spectrim.api import resize
from spectrim.arguments import check_whole, refuse_unused
from spectrim.data.windows import Windows
from spectrim.errors import InputError
from spectrim.evaluate.perplexity import perplexity
from spectrim.evaluate.points import is_dense_format
from spectrim.report.content import read_curve_file
from spectrim.run.learned.elastic import ElasticModel
from spectrim.run.loading import LoadedModel
from spectrim.run.progress import Progress
from spectrim.serve.slider.engine import Engine
from spectrim.serve.slider.server import LOCAL_NAMES, SliderServer
from spectrim.storage.paths import last_part
from spectrim.studies.measure import Measure
from spectrim.studies.opening import dense_twin, has_every_size, open_sizes

STAGE = "measure sizes"
LANDMARKS = 4
"""Sizes below 1 that are measured before the page is served."""


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
        curve: what `spectrim curve` wrote for this artifact and text, for predictions; without
            it a few sizes are measured first.
        host: address to listen on; the page writes folders for this machine's users only.
        port: 0 takes any free one.

    Raises:
        SpectrimError: the artifact cannot be loaded, or the address is taken.
    """
    measure = measure or Measure()
    check_whole(least=0, most=65535, port=port)
    if measure.text is None:
        words = {"max_tokens": measure.max_tokens, "window_length": measure.window_length}
        refuse_unused("without a text nothing is measured", {"curve": curve, **words})
    if not has_every_size(artifact):
        raise InputError(
            f"{artifact} is neither an elastic artifact nor a survey; make one with "
            "`spectrim compress --recipe acip` or `spectrim survey`"
        )
    elastic = open_sizes(Path(artifact), measure)
    dense = dense_twin(elastic.model)
    windows: Windows | None = None
    known: dict[float, float] = {}
    measured: dict[float, float] = {}
    if measure.text is not None:
        loaded = LoadedModel(dense, elastic.tokenizer, str(artifact), elastic.elastic.dtype)
        windows = measure.windows(loaded)
        measured[1.0] = perplexity(dense, windows, batch=measure.batch).perplexity
        if curve is not None:
            known = _from_curve(curve, Path(artifact).resolve().name)
        else:
            measured |= _landmarks(elastic, windows, measure.batch, measure.options.progress)
    engine = Engine(
        name=Path(artifact).resolve().name,
        dense=dense,
        elastic=elastic,
        tokenizer=elastic.tokenizer,
        smallest_keep=elastic.sizes.smallest_keep,
        other_bytes=elastic.elastic.base.other_bytes,
        windows=windows,
        known=known,
        measured=measured,
        model_name=last_part(elastic.elastic.base.name),
        write=partial(_save, Path(artifact), Path.cwd()) if host in LOCAL_NAMES else None,
    )
    return SliderServer(engine, host=host, port=port)


def _save(artifact: Path, place: Path, keep: float) -> Path:
    """Write a size of the artifact to a folder of its own, named after both."""
    output = place / f"{artifact.resolve().name}-{keep:.2f}"
    resize(artifact, keep=keep, output=output)
    return output


def _landmarks(
    elastic: ElasticModel, windows: Windows, batch: int, progress: Progress
) -> dict[float, float]:
    """Perplexity of some sizes down to the end, so that every size between has a prediction."""
    smallest = elastic.sizes.smallest_keep
    found = {}
    progress.start(STAGE, LANDMARKS)
    for step in range(LANDMARKS):
        plan = elastic.resize(smallest + (1.0 - smallest) * step / LANDMARKS)
        found[plan.achieved_keep] = perplexity(elastic.model, windows, batch=batch).perplexity
        progress.advance(STAGE, f"keep {plan.achieved_keep:.2f}")
    progress.finish(STAGE)
    elastic.resize(1.0)
    return found


def _from_curve(curve: str | Path, name: str) -> dict[float, float]:
    """Points of this artifact; other recipes in the same file predict other models."""
    points = [p for p in read_curve_file(curve) if not is_dense_format(p)]
    names = sorted({p.recipe for p in points})
    chosen = name if name in names else names[0] if len(names) == 1 else None
    if chosen is None:
        raise InputError(
            f"{curve} has the points of {', '.join(names) or 'nothing'}, none of {name}; make "
            f"them with `spectrim curve {name}`"
        )
    return {p.achieved: p.perplexity for p in points if p.recipe == chosen}

"""The slider's server for an elastic artifact or a survey."""

from __future__ import annotations

from pathlib import Path

from spectrim.errors import InputError
from spectrim.evaluate.perplexity import perplexity
from spectrim.measure.evaluating import evaluation_windows_of
from spectrim.report.content import read_curve_file
from spectrim.run.loading import LoadedModel
from spectrim.slider.engine import Engine
from spectrim.slider.server import SliderServer
from spectrim.studies.measure import Measure
from spectrim.studies.opening import dense_twin, has_every_size, open_sizes

__all__ = ["slider"]


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
    if not has_every_size(artifact):
        raise InputError(
            f"{artifact} is neither an elastic artifact nor a survey; make one with "
            "`spectrim compress --recipe acip` or `spectrim survey`"
        )
    elastic = open_sizes(Path(artifact), measure)
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

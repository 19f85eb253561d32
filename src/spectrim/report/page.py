"""One self-contained HTML page: no script, no network, figures as inline SVG.

Everything that comes from a file is escaped by the template engine; only our own SVG is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from spectrim import __version__
from spectrim.allocate.budget import format_bytes
from spectrim.errors import MissingExtraError
from spectrim.evaluate.distortion import distortion_rows
from spectrim.report.content import PageContent
from spectrim.report.pictures import pictures_of
from spectrim.report.predicted import loss_words
from spectrim.storage.paths import last_part, without_folders

PAGE_MARK = "Compression report by spectrim"
"""In every page that was written here; a file without it is somebody else's."""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `words` columns are words, the others numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def render_page(content: PageContent) -> str:
    """The page as text.

    Raises:
        MissingExtraError: jinja2 or matplotlib is absent.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("jinja2", "plot", "writing the HTML report") from error
    source = files("spectrim.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    report = content.report
    return environment.from_string(source).render(
        title=headline(content),
        subtitle=f"{last_part(report['model'])} after {report['recipe']['name']}",
        version=__version__,
        bars=_bars(content),
        remarks=_remarks(content),
        summary=_summary(content),
        evaluation=_evaluation_table(content.evaluations),
        pictures=[(p, Markup(p.svg)) for p in pictures_of(content)],  # noqa: S704
        depth=_depth_table(content),
        targets=_target_table(report["targets"]),
        protocol=_protocol(content),
        notes=[without_folders(str(note)) for note in report["notes"]],
        left_alone=[(str(k), without_folders(str(v))) for k, v in report["left_alone"].items()],
        seconds=[(str(k), number(v)) for k, v in report["seconds"].items()],
        environment=[(str(k), str(v)) for k, v in report["environment"].items()],
        recipe=without_folders(content.recipe_yaml),
        samples=_samples(content),
    )


@dataclass(frozen=True)
class Quality:
    """Perplexity before and after on one text."""

    text: str
    dense: float
    compressed: float
    how: str


def quality_of(content: PageContent) -> Quality | None:
    """The measurement a page leads with: beside the dense model if there is one, or the run's own.

    Of the texts that the run measured, one that it was not calibrated on goes first.
    """
    if len(content.evaluations) > 1:
        dense, compressed = content.evaluations[:2]
        text = next(iter(compressed["perplexity"]))
        pair = (dense["perplexity"].get(text), compressed["perplexity"][text])
        if pair[0] is not None:
            return Quality(text, *(m["perplexity"] for m in pair), how=f"on {last_part(text)}")
    texts = (content.report.get("measured") or {}).get("texts") or []
    if not texts:
        return None
    chosen = next((t for t in texts if t["kind"] == "other"), texts[0])
    pair = (chosen["dense"]["perplexity"], chosen["compressed"]["perplexity"])
    how = f"on {chosen['windows']} windows of {last_part(chosen['text'])}: {chosen['what']}"
    return Quality(chosen["text"], *pair, how=how)


def headline(content: PageContent) -> str:
    """`34 % smaller, perplexity 41.4 → 45.5`."""
    smaller = 1 - content.report["keep"]["whole_model"]
    size = f"{smaller:.0%} smaller" if smaller > 0 else f"{-smaller:.0%} larger"
    size = size.replace("%", " %")
    quality = quality_of(content)
    if quality is None:
        return size
    return f"{size}, perplexity {quality.dense:.3g} → {quality.compressed:.3g}"


@dataclass(frozen=True)
class Bars:
    """One quantity before and after; widths in percent of the longer bar."""

    title: str
    rows: tuple[tuple[str, str, float], ...]
    caption: str


def _bars(content: PageContent) -> list[Bars]:
    sizes = content.report["keep"]["model_bytes"]
    pairs = [("Size", sizes["dense"], sizes["stored"], format_bytes, "the whole model, as stored")]
    quality = quality_of(content)
    if quality is not None:
        caption = f"perplexity {quality.how}; lower is better"
        pairs.append(("Quality", quality.dense, quality.compressed, "{:.3g}".format, caption))
    bars = []
    for title, dense, compressed, words, caption in pairs:
        longest = max(dense, compressed) or 1
        named = (("dense", dense), ("compressed", compressed))
        rows = tuple((name, words(value), 100 * value / longest) for name, value in named)
        bars.append(Bars(title, rows, caption))
    return bars


def _remarks(content: PageContent) -> list[str]:
    """What a reader should know, in plain words; the run's own notes are among the details."""
    report = content.report
    found = []
    dense = sum(1 for t in report["targets"] if t.get("rank") is None)
    if dense:
        found.append(f"Left as they were: {dense} of {len(report['targets'])} layers.")
    outside = report.get("outside_budget")
    if outside:
        found.append(f"Outside the budget: {without_folders(outside['words'])}.")
    elif report["left_alone"]:
        found.append(f"{len(report['left_alone'])} other modules were not compressed.")
    measured = report.get("measured") or {}
    if measured.get("why_not"):
        found.append(f"Quality was not measured: {measured['why_not']}.")
    elif quality_of(content) is None:
        found.append("Quality was not measured.")
    for text in measured.get("texts") or []:
        if text.get("routing") is not None:
            found.append(
                f"Routers send {text['routing']:.0%} of the tokens of {last_part(text['text'])} to "
                "the same experts as before."
            )
    return found


def number(value: Any) -> str:
    """A number with four digits; a dash for what is unknown."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _pair(pair: Mapping[str, int]) -> str:
    return f"{format_bytes(pair['stored'])} of {format_bytes(pair['dense'])}"


def _summary(content: PageContent) -> list[tuple[str, str]]:
    report, keep = content.report, content.report["keep"]
    dense = sum(1 for t in report["targets"] if t.get("rank") is None)
    facts = [
        ("model", last_part(report["model"])),
        ("recipe", report["recipe"]["name"]),
        ("keep", f"{number(keep['achieved'])} (asked for {number(keep['asked'])})"),
        ("compressed layers", _pair(keep["target_bytes"])),
        ("whole model", f"{_pair(keep['model_bytes'])}, {keep['whole_model']:.1%}"),
        ("layers", f"{len(report['targets'])}, {dense} left dense"),
        ("ranks chosen by", str(report["rule"])),
    ]
    measured = (report.get("measured") or {}).get("texts") or []
    unit = report.get("predicted_loss_unit")
    predicted = loss_words(report.get("predicted_loss"), unit, measured)
    if predicted is not None:
        facts.append(("predicted loss", without_folders(predicted)))
    facts.append(("time", f"{sum(_finite(report['seconds'].values())):.0f} s"))
    if isinstance(report.get("peak_memory_bytes"), int):
        facts.append(("peak memory", format_bytes(report["peak_memory_bytes"])))
    return facts


def _finite(values: Any) -> list[float]:
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def _protocol(content: PageContent) -> list[tuple[str, str]]:
    calibration = content.report.get("calibration")
    facts = [("calibration", "no data")]
    if isinstance(calibration, Mapping):
        facts = [(f"calibration {k}", _words(v)) for k, v in calibration.items()]
    for record in content.evaluations[:1]:
        for text, measured in record["perplexity"].items():
            facts += [
                (f"{last_part(text)} {k}", _words(v)) for k, v in measured["protocol"].items()
            ]
    return facts


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_words(v) for v in value)
    return without_folders(value) if isinstance(value, str) else number(value)


def _evaluation_table(evaluations: Sequence[Mapping[str, Any]]) -> Table | None:
    if not evaluations:
        return None
    rows = []
    for record in evaluations:
        for text, measured in record["perplexity"].items():
            compared = record.get("agreement", {}).get(text, {})
            rows.append(
                (
                    last_part(str(record["model"])),
                    last_part(str(text)),
                    _with_error(measured["perplexity"], measured["standard_error"]),
                    number(measured["nll"]),
                    _with_error(compared.get("kl"), compared.get("kl_standard_error")),
                    f"{compared['top1']:.1%}" if "top1" in compared else "–",
                    number(record["parameters"]),
                )
            )
    headers = ("model", "text", "perplexity", "nats/token", "KL to dense", "same top", "parameters")
    return Table(headers, tuple(rows), words=2)


def _with_error(value: Any, error: Any) -> str:
    return number(value) if error is None else f"{number(value)} ± {error:.2g}"


def _target_table(targets: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for t in targets:
        storage = t["storage"] if t["weights"] == "native" else f"{t['storage']} {t['weights']}"
        rows.append(
            (
                t["name"],
                "×".join(str(side) for side in t["shape"]),
                number(t.get("rank")),
                storage,
                format_bytes(t["bytes"]),
                f"{t['kept']:.1%}",
                number(t.get("predicted_error")),
                number(t.get("measured_error")),
                number(t.get("damping")),
            )
        )
    headers = (
        *("target", "shape", "rank", "storage", "bytes", "kept"),
        *("predicted error", "measured error", "damping"),
    )
    return Table(headers, tuple(rows))


def _depth_table(content: PageContent) -> Table | None:
    rows = distortion_rows(content.depth)
    if not rows:
        return None
    headers = tuple(rows[0])
    cells = tuple(tuple(number(row.get(h)) for h in headers) for row in rows)
    return Table(headers, cells, words=2)


def _samples(content: PageContent) -> list[tuple[str, list[tuple[str, str]]]]:
    prompts: dict[str, list[tuple[str, str]]] = {}
    for sample in content.samples:
        prompts.setdefault(sample.prompt, []).append(
            (sample.model, sample.continuation.lstrip(" "))
        )
    return list(prompts.items())

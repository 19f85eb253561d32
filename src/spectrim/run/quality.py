"""What a run costs, measured: perplexity of the model before and after, on the same windows.

The windows are parts of the calibration text that the run itself does not read, and, if the user
gives one, another text. Where nothing is left of the calibration text its own windows are used, and
called so; where it was sampled from the model, further windows are sampled with another seed.

Measuring may take a tenth of the run: two forward passes (dense and compressed) over so few windows
that the passes of the run over its own calibration windows take ten times as long. Rounding to the
stored dtype is part of what is measured; arithmetic is in the dtype that the run works in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from spectrim.data.self_text import sample_windows
from spectrim.data.text import SELF, read_text
from spectrim.data.windows import Windows, evaluation_windows, longest_window
from spectrim.decompose import OBJECTIVES
from spectrim.errors import NonFiniteError, TextError
from spectrim.evaluate.bootstrap import perplexity_difference
from spectrim.evaluate.perplexity import Perplexity, perplexity
from spectrim.evaluate.routing import routing_agreement
from spectrim.model.pinning import Pins
from spectrim.model.weights import cast_parameters
from spectrim.recipe import Recipe
from spectrim.run.job import Job
from spectrim.run.loading import LoadedModel
from spectrim.run.texts import UserText, vocabulary_size

STAGE = "measure"

MOST_WINDOWS = 64
FEWEST_WINDOWS = 2
"""One window would leave no standard error."""

FEWEST_TOKENS = 4096
"""Fewer say nothing. In runs so short that this is more than a tenth of their own passes, reading
the model and decomposing it is what takes the time."""

LITERATURE_LENGTH = 2048
"""Tokens per window where nothing says how many."""

SHARE = 0.1
"""Of the run's own forward passes."""

_TRAINING_PASSES = 6
"""Passes that a learned recipe makes at the very least: forwards and backwards of one epoch."""

Kind = Literal["held out", "sampled", "calibration", "other"]

KINDS: dict[Kind, str] = {
    "held out": "parts of the calibration text that the run did not read",
    "sampled": "sampled from the model itself, with another seed than the calibration windows",
    "calibration": "the calibration windows themselves, since nothing else of the text is left",
    "other": "another text than the run was calibrated on",
}


@dataclass
class Passage:
    """One set of windows, the dense model's losses on it, and what its routers chose."""

    text: str
    kind: Kind
    windows: Windows
    dense: Perplexity
    choices: list[Tensor]


@dataclass
class Before:
    """What was measured before the model is changed.

    Attributes:
        passages: none where nothing could be measured.
        dtype: that the dense model was measured in.
        why_not: the reason, in words, where nothing was measured.
    """

    passages: list[Passage] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    why_not: str | None = None


def passes_over_windows(recipe: Recipe) -> int:
    """Forward passes over all calibration windows that a run makes at least."""
    objective = OBJECTIVES[recipe.decompose.objective]
    if recipe.flow == "learned":
        return _TRAINING_PASSES
    forwards = 2 if recipe.flow == "sequential" else int(bool(objective.original))
    return forwards + (3 if objective.outputs else 0)


def measure_before(job: Job, loaded: LoadedModel, text: UserText = None) -> Before:
    """Choose windows and measure the dense model on them.

    Args:
        job: opened, its model untouched.
        loaded: that model with its tokenizer.
        text: another text to measure on, besides the calibration text.

    Raises:
        TextError: the other text is unknown or too short.
    """
    if loaded.onloader is not None:
        return Before(why_not="the model is not in memory; `spectrim evaluate` measures the result")
    if job.windows is None and text is None:
        return Before(why_not="the recipe reads no text and none was given to measure on")
    job.progress.start(STAGE, 1)
    found: list[tuple[Kind, Windows]] = []
    if job.windows is not None:
        kind, windows = _beside_calibration(job, loaded, job.windows, 1 if text is None else 2)
        found.append((kind, windows))
    if text is not None:
        found.append(("other", _of_other_text(job, loaded, text)))
    passages = []
    for kind, windows in found:
        try:
            dense, choices = _measured(job, windows)
        except NonFiniteError as error:
            # The run itself will name the layer; a number for the report is not worth stopping it.
            job.progress.finish(STAGE)
            return Before(why_not=str(error))
        sources = " and ".join(windows.sources)
        passages.append(Passage(sources, kind, windows, dense, choices))
    job.progress.finish(STAGE)
    return Before(passages, job.model.dtype)  # type: ignore[arg-type]


def measure_after(job: Job, before: Before, stored: torch.dtype) -> dict[str, Any]:
    """Measure the compressed model beside the dense one; JSON-ready, for the report.

    Args:
        job: finished; its parameters have the stored dtype, and have it again afterwards.
        before: of this job.
        stored: the checkpoint's dtype.
    """
    records: list[dict[str, Any]] = []
    why_not = before.why_not
    if before.passages:
        job.progress.start(STAGE, 1)
        cast_parameters(job.model, before.dtype)
        for passage in before.passages:
            try:
                after, choices = _measured(job, passage.windows)
            except NonFiniteError as error:
                why_not = f"the compressed model is broken: {error}"
                break
            difference = None
            if len(passage.windows) >= FEWEST_WINDOWS:
                generator = torch.Generator().manual_seed(0)
                difference = perplexity_difference(after, passage.dense, generator=generator)
            records.append(
                {
                    "text": passage.text,
                    "kind": passage.kind,
                    "what": KINDS[passage.kind],
                    "windows": len(passage.windows),
                    "window_length": passage.windows.length,
                    "dense": passage.dense.record(),
                    "compressed": after.record(),
                    "difference": None if difference is None else difference.record(),
                    **({"routing": _routing(passage.choices, choices)} if choices else {}),
                }
            )
        cast_parameters(job.model, stored)
        job.progress.finish(STAGE)
    return {"texts": records, "why_not": why_not}


def _measured(job: Job, windows: Windows) -> tuple[Perplexity, list[Tensor]]:
    """The losses of the model as it is now, and what the routers of a mixture chose."""
    if not job.anatomy.is_mixture:
        return perplexity(job.model, windows, batch=job.batch), []
    pins = Pins()
    with pins.writing():
        found = perplexity(job.model, windows, batch=job.batch)
    return found, pins.choices


def _routing(dense: list[Tensor], compressed: list[Tensor]) -> float:
    """Share of tokens that the routers send to the same experts as before, mean of all routers."""
    shares = routing_agreement(dense, compressed)
    tokens = [choices.numel() // choices.shape[-1] for choices in dense]
    return sum(s * n for s, n in zip(shares, tokens, strict=True)) / sum(tokens)


def affordable(recipe: Recipe, windows: Windows | None, length: int, texts: int) -> int:
    """Windows of a length to measure on, one of so many texts."""
    own = 0 if windows is None else len(windows) * windows.length
    tokens = SHARE / 2 * passes_over_windows(recipe) * own / texts
    count = int(max(tokens, min(FEWEST_TOKENS, max(own, length)) / texts) / length)
    return max(FEWEST_WINDOWS, min(MOST_WINDOWS, count))


def _beside_calibration(
    job: Job, loaded: LoadedModel, windows: Windows, texts: int
) -> tuple[Kind, Windows]:
    """Windows like those of the calibration, but others, as far as there are any."""
    count = affordable(job.recipe, windows, windows.length, texts)
    if windows.spare is not None and len(windows.spare) >= FEWEST_WINDOWS:
        return "held out", spread(windows.spare, count)
    if SELF in windows.sources:
        further = sample_windows(
            job.model,
            windows=count,
            window_length=windows.length,
            seed=(job.recipe.seed + 1) % 2**63,
            tokenizer=loaded.tokenizer,
        )
        return "sampled", further
    return "calibration", windows.take(min(count, len(windows)))


def _of_other_text(job: Job, loaded: LoadedModel, text: UserText) -> Windows:
    if text is None or isinstance(text, torch.Tensor) or loaded.tokenizer is None:
        raise TextError("give the text to measure on as a source, a file or documents")
    length = job.recipe.calibration.window_length or LITERATURE_LENGTH
    if job.windows is not None:
        length = job.windows.length
    found = evaluation_windows(
        read_text(text, split="evaluation", tokenizer=loaded.tokenizer),
        loaded.tokenizer,
        window_length=min(length, longest_window(loaded.model.config) or length),
        bos="none" if job.recipe.calibration.bos == "none" else "each",
    )
    found.check_vocabulary(vocabulary_size(loaded.model))
    texts = 1 if job.windows is None else 2
    return spread(found, affordable(job.recipe, job.windows, found.length, texts))


def spread(windows: Windows, count: int) -> Windows:
    """At most `count` windows, evenly from first to last."""
    count = min(count, len(windows))
    return windows.pick(torch.linspace(0, len(windows) - 1, count).round().long())

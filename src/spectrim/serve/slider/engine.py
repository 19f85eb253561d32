"""What the slider's page asks for: a size, its perplexity, both models' continuations, a folder.

One lock guards the model. What a size takes is known without the model; a stream holds the lock for
one token at a time and brings the model to its own size again, so that several tabs write side by
side. A measurement holds it for longer: whoever finds it taken is told so and asks again.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectrim.data.sampling import sampled_tokens
from spectrim.data.windows import Windows, longest_window
from spectrim.errors import InputError, TextError
from spectrim.evaluate.perplexity import perplexity

MOST_TOKENS = 200
PATIENCE = 0.5
"""Seconds that a request waits for the model before it is told that it is busy."""

FOREVER = -1
"""Of a stream's next token: its reader sees that it waits."""

UNFINISHED = "�"
"""What a decoder shows for the first bytes of a character whose rest has not come yet."""


class BusyError(InputError):
    """Another request is using the model."""


class Resizable(Protocol):
    """An elastic model: its `model` takes any size in place."""

    model: Any

    def planned(self, keep: float) -> Any:
        """The plan of a size, without taking it."""
        ...

    def resize(self, keep: float) -> Any:
        """Change the size; returns the plan of it."""
        ...


@dataclass(eq=False)
class Engine:
    """Answers requests one at a time.

    Attributes:
        name: of the artifact, for the page.
        dense: the original model.
        elastic: resized in place; shares nothing with `dense` that it changes.
        tokenizer: of both.
        smallest_keep: the artifact's end.
        other_bytes: of everything that is not a target.
        windows: to measure perplexity on; None shows no perplexity.
        known: keep -> perplexity of an earlier study on the same text, for predictions.
        measured: keep -> perplexity measured on the windows.
        model_name: what it was made from, for the page; the artifact's name by default.
        write: writes the size of a keep to a folder and returns its path; None where the page may
            not write.

    Raises:
        TextError: there is no tokenizer.
    """

    name: str
    dense: nn.Module
    elastic: Resizable
    tokenizer: Any
    smallest_keep: float
    other_bytes: int
    windows: Windows | None = None
    known: Mapping[float, float] = field(default_factory=dict)
    measured: dict[float, float] = field(default_factory=dict)
    model_name: str = ""
    write: Callable[[float], Path] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _saving: threading.Lock = field(default_factory=threading.Lock, init=False)
    _size: float | None = field(default=None, init=False)

    def __post_init__(self):
        if self.tokenizer is None:
            raise TextError(f"{self.name!r} has no tokenizer; the page cannot read prompts")
        self._longest = longest_window(self.dense.config)  # type: ignore[arg-type]

    @contextmanager
    def _alone(self, lock: threading.Lock, *, wait: float = PATIENCE) -> Iterator[None]:
        if not lock.acquire(timeout=wait):
            raise BusyError("the model is busy with another request; try again in a moment")
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _at(self, keep: float, *, wait: float = PATIENCE) -> Iterator[None]:
        """The model at a size, and nobody else using it."""
        with self._alone(self._lock, wait=wait):
            if self._size != keep:
                self.elastic.resize(keep)
                self._size = keep
            yield

    def facts(self) -> dict[str, Any]:
        """What the page needs to draw itself."""
        points = sorted({**self.known, **self.measured}.items())
        return {
            "name": self.name,
            "model": self.model_name or self.name,
            "smallest_keep": self.smallest_keep,
            "measures": self.windows is not None,
            "saves": self.write is not None,
            "most_tokens": MOST_TOKENS,
            "curve": [{"keep": keep, "perplexity": value} for keep, value in points],
        }

    def size(self, keep: float) -> dict[str, Any]:
        """What a size takes and what it is expected to cost; the model stays as it is.

        Raises:
            InputError: not a size, or below the artifact's end.
        """
        if not isinstance(keep, int | float) or isinstance(keep, bool) or not 0 < keep <= 1:
            raise InputError(f"keep is {keep!r}; it is a fraction in (0, 1]")
        if keep < self.smallest_keep:
            raise InputError(
                f"keep {keep:g} is below the end of this artifact; its smallest is "
                f"{self.smallest_keep:.6f}"
            )
        plan = self.elastic.planned(float(keep))
        stored = sum(entry.bytes for entry in plan.entries)
        dense = sum(entry.dense_bytes for entry in plan.entries)
        achieved = stored / dense
        return {
            "keep": achieved,
            "bytes": stored + self.other_bytes,
            "dense_bytes": dense + self.other_bytes,
            "estimated": self._estimate(achieved),
            "measured": self.measured.get(achieved),
        }

    def measure(self, keep: float) -> dict[str, Any]:
        """The size's facts with its perplexity; measured once per size.

        Raises:
            InputError: as `size`, or there is no text to measure on.
            BusyError: another request is running.
        """
        if self.windows is None:
            raise InputError("there is no text to measure on; start with --evaluation-text")
        found = self.size(keep)
        with self._at(float(keep)):
            if found["keep"] not in self.measured:
                self.measured[found["keep"]] = perplexity(
                    self.elastic.model, self.windows
                ).perplexity
        return found | {"measured": self.measured[found["keep"]]}

    def save(self, keep: float) -> dict[str, Any]:
        """Write the size as an ordinary folder; returns where it is and its facts.

        Raises:
            InputError: as `size`, or this page may not write.
            OutputError: the folder exists or cannot be written.
            BusyError: another size is being written.
        """
        if self.write is None:
            raise InputError("this page may not write; it is served to other machines")
        found = self.size(keep)
        with self._alone(self._saving):
            return found | {"folder": str(self.write(float(keep)))}

    def _estimate(self, keep: float) -> float | None:
        """Perplexity between measured sizes, straight in its logarithm; None outside them."""
        points = sorted({**self.known, **self.measured}.items())
        place = bisect_left([k for k, _ in points], keep)
        if place < len(points) and points[place][0] == keep:
            return points[place][1]
        if not 0 < place < len(points):
            return None
        (k1, p1), (k2, p2) = points[place - 1], points[place]
        share = (keep - k1) / (k2 - k1)
        return math.exp((1 - share) * math.log(p1) + share * math.log(p2))

    def continuations(self, prompt: str, keep: float, tokens: int) -> Iterator[dict[str, Any]]:
        """Both models' next words, token by token in turn.

        Yields:
            First the size's facts, maybe a note, then pieces `{model, text, tokens,
            tokens_per_second}`, the last of each model with `done`.

        Raises:
            TextError: an empty prompt.
            InputError: a size or a number of tokens out of reach.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise TextError("the prompt is empty; write at least one word")
        if not isinstance(tokens, int) or not 1 <= tokens <= MOST_TOKENS:
            raise InputError(f"asked for {tokens!r} tokens; ask for 1 to {MOST_TOKENS}")
        yield {"size": self.size(keep)}
        ids = list(self.tokenizer(prompt)["input_ids"])
        if not ids:
            raise TextError("the prompt has no tokens; write at least one word")
        if self._longest is not None:
            tokens = min(tokens, max(1, self._longest // 2))
            room = self._longest - tokens
            if len(ids) > room:
                yield {"note": f"the prompt has {len(ids)} tokens; its last {room} are used"}
                ids = ids[-room:]
        with self._at(float(keep), wait=FOREVER):
            models = {"dense": self.dense, "compressed": self.elastic.model}
        writers = {n: _Writer(m, self.tokenizer, ids, tokens) for n, m in models.items()}
        while writers:
            for model, writer in list(writers.items()):
                with self._at(float(keep), wait=FOREVER):
                    piece = writer.step()
                yield {"model": model, **piece}
                if writer.done:
                    del writers[model]


class _Writer:
    """One model's continuation, a token at a time, with the seconds that the model took."""

    def __init__(self, model: Any, tokenizer: Any, ids: list[int], tokens: int):
        self.tokenizer = tokenizer
        self.prompt = ids
        self.done = False
        self._before = tokenizer.decode(ids, skip_special_tokens=True)
        self._shown = ""
        self._written: list[int] = []
        self._seconds = 0.0
        self._wanted = tokens
        self._ends = _end_ids(model)
        self._stream = sampled_tokens(model, torch.tensor([ids]), steps=tokens, chances=None)

    def step(self) -> dict[str, Any]:
        """The next piece of text, with the speed so far."""
        started = time.perf_counter()
        token: Tensor | None = next(self._stream, None)
        self._seconds += time.perf_counter() - started
        ended = token is None or int(token) in self._ends
        if token is not None and not ended:
            self._written.append(int(token))
        self.done = ended or len(self._written) >= self._wanted
        written = len(self._written)
        speed = written / self._seconds if written and self._seconds > 0 else None
        piece = {"text": self._fresh(), "tokens": written, "tokens_per_second": speed}
        return piece | {"done": True} if self.done else piece

    def _fresh(self) -> str:
        """What has become readable since the last piece."""
        whole = self.tokenizer.decode(self.prompt + self._written, skip_special_tokens=True)
        text = whole[len(self._before) :] if whole.startswith(self._before) else ""
        if text.endswith(UNFINISHED) and not self.done:
            return ""
        fresh, self._shown = text[len(self._shown) :], text
        return fresh


def _end_ids(model: Any) -> frozenset[int]:
    """Tokens that end a text."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends) if isinstance(ends, list | tuple) else frozenset([ends])

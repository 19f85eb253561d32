"""Facts for the report, gathered while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from spectrim.run.shortage import in_stage


@dataclass
class RunLog:
    """Facts for the report, gathered while the run goes on.

    Attributes:
        stages: seconds by stage.
        targets: name -> facts of that target (errors, damping, seconds).
        blocks: block name -> facts of its refinement.
        network: refinement step -> facts of it, for steps that train all blocks together.
        notes: downgrades and other things that a reader must know.
        predicted: bytes at the peak, 0 where nothing was predicted.
    """

    stages: dict[str, float] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    network: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    predicted: int = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the body to a stage.

        Raises:
            MemoryShortError: an allocation failed in the body; names the stage.
        """
        started = time.perf_counter()
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            short = in_stage(error, stage, self.predicted)
            if short is None:
                raise
            raise short from error
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - started

    def target(self, name: str, **facts: Any) -> None:
        """Add facts of one target."""
        self.targets.setdefault(name, {}).update(facts)

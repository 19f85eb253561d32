"""Facts for the report, gathered while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunLog"]


@dataclass
class RunLog:
    """Facts for the report, gathered while the run goes on.

    Attributes:
        stages: seconds by stage.
        targets: name -> facts of that target (errors, damping, seconds).
        blocks: block name -> facts of its refinement.
        network: refinement step -> facts of it, for steps that train all blocks together.
        notes: downgrades and other things that a reader must know.
    """

    stages: dict[str, float] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    network: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the body to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - started

    def target(self, name: str, **facts: Any) -> None:
        """Add facts of one target."""
        self.targets.setdefault(name, {}).update(facts)

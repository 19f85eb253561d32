"""How a run tells whoever started it where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """What the library calls. A stage is a short phrase such as `moments`; totals are steps."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """The stages of the run are predicted to take so long; may be left out."""

    def start(self, stage: str, total: int) -> None:
        """A stage of `total` steps begins; starting it again counts from zero."""

    def advance(self, stage: str, note: str = "") -> None:
        """One step is done; the note says what just happened (a block, a loss)."""

    def finish(self, stage: str) -> None:
        """The stage is over."""


class Silent:
    """Progress that shows nothing."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Show nothing."""

    def start(self, stage: str, total: int) -> None:
        """Show nothing."""

    def advance(self, stage: str, note: str = "") -> None:
        """Show nothing."""

    def finish(self, stage: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""

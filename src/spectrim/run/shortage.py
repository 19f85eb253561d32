"""What a process holds, and an allocation that failed in the middle of a run with its stage."""

from __future__ import annotations

from pathlib import Path

from spectrim.errors import MemoryShortError
from spectrim.shortage import ran_short


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs, 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")), 0)


def in_stage(error: Exception, stage: str, predicted: int) -> MemoryShortError | None:
    """The lack of memory behind an error, with its stage; None where it is something else.

    Args:
        error: as it was raised.
        stage: what was going on.
        predicted: bytes at the peak, 0 where nothing was predicted.
    """
    short = ran_short(error)
    if short is None:
        return None
    expected = f", {predicted / 1e9:.1f} GB were predicted" if predicted else ""
    return MemoryShortError(
        f"in the stage {stage!r}, where the process holds {anonymous_bytes() / 1e9:.1f} GB"
        f"{expected}, {short}; so does a smaller --batch. The same command takes up what is "
        "finished"
    )

"""Print what to install for one end of the range that `pyproject.toml` allows.

    python tests/library_versions.py oldest    # torch==2.6, ...
    python tests/library_versions.py newest    # torch>=2.6, ...; pip takes the newest

Needs Python 3.11 or newer, and nothing else.
"""

import sys
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
FOR_TESTS = ("hypothesis", "pytest", "pytest-xdist")


def requirements(end: str) -> list[str]:
    """The package's dependencies at one end, and what the tests need."""
    if end not in ("oldest", "newest"):
        raise SystemExit(f"{end!r} is no end of a range; give oldest or newest")
    listed = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    if end == "oldest":
        listed = [entry.partition(",")[0].replace(">=", "==") for entry in listed]
    return [*listed, *FOR_TESTS]


if __name__ == "__main__":
    print("\n".join(requirements(*sys.argv[1:])))

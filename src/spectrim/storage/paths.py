"""What leaves this machine names files without the folders they lie in."""

from __future__ import annotations

import re

_PATH = re.compile(
    r"""(?<![\w:/.~-])              # not inside a word, an address or another path
        (?:[A-Za-z]:)?(?:~|\.\.?)?  # a drive, the home folder, or a relative start
        (?:[/\\][\w.@+=~-]+)+       # at least one folder or the file itself
    """,
    re.VERBOSE,
)


def without_folders(text: str) -> str:
    """A text in which every path is only its last part; web addresses stay."""
    return _PATH.sub(lambda found: last_part(found.group()), text)


def last_part(name: str) -> str:
    """The last part of a path or hub name."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name

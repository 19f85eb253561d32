"""Which of a model's targets are compressed: patterns of the user, on names like file names.

A target that is left out is protected: it stays as it is and is no target any more, so that budgets
count it as they count everything that never was one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from spectrim.errors import InputError
from spectrim.model.anatomy import Anatomy, Block, Group, Target

PROTECTED = "protected"
"""How the reason of every protected target begins."""


def matches(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that fits a name; `*` also fits dots, `?` and `[...]` as in file names."""
    return next((p for p in patterns if fnmatchcase(name, p)), None)


def choose_targets(anatomy: Anatomy, only: Sequence[str], skip: Sequence[str]) -> Anatomy:
    """An anatomy whose targets fit one of `only` (all, if there is none) and none of `skip`.

    Raises:
        InputError: a pattern that fits no target, or patterns that leave none.
    """
    if not only and not skip:
        return anatomy
    names = [t.name for t in anatomy.targets]
    check_patterns([*only, *skip], names)
    reasons: dict[str, str] = {}
    for name in names:
        skipped = matches(name, skip)
        if skipped is not None:
            reasons[name] = f"{PROTECTED}: skip {skipped!r}"
        elif only and matches(name, only) is None:
            reasons[name] = f"{PROTECTED}: not among only {', '.join(map(repr, only))}"
    if len(reasons) == len(names):
        raise InputError(
            f"only and skip leave none of the {len(names)} targets; name fewer to skip"
        )
    blocks = tuple(_chosen(block, reasons) for block in anatomy.blocks)
    return Anatomy(blocks, {**anatomy.left_alone, **reasons})


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Every pattern must fit a target: a slip of the pen would otherwise protect nothing.

    Raises:
        InputError: names the pattern and the nearest target.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise InputError(
                f"the pattern {pattern!r} fits none of the {len(names)} targets; one of them is "
                f"{near[0] if near else names[0]!r}"
            )


def _chosen(block: Block, left_out: dict[str, str]) -> Block:
    groups: list[Group] = []
    for group in block.groups:
        kept: list[Target] = [t for t in group.targets if t.name not in left_out]
        if kept:
            index = len(groups)
            targets = tuple(replace(t, group=index) for t in kept)
            groups.append(replace(group, index=index, targets=targets))
    return replace(block, groups=tuple(groups))

"""Names on disk against names in memory, in the form transformers applies in both directions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers.core_model_loading import PrefixChange, WeightRenaming

from spectrim.layers.layout import layout_of

END = r"(?![\w.])"
"""Nothing of the key may follow. A lookahead, since transformers drops it when it reverses a
pattern, where it would carry a `$` over into the name."""


class SpectrimRenaming(WeightRenaming):
    """A renaming of ours, told apart from those of the architecture."""

    __slots__ = ()


def unfolded_conversions(conversions: Iterable[Any], experts: Collection[str]) -> list[Any]:
    """The conversions of an architecture that hold for a model whose experts are single layers.

    Such a model has layers that the architecture has no names for, and is stored under its names
    in memory: patterns meant for other files could take a layer's name for one of theirs.

    Args:
        conversions: of the dense architecture.
        experts: names of the parameters in whose place the model has single layers.
    """
    return [c for c in conversions if not experts or isinstance(c, PrefixChange)]


def renamings(storages: Mapping[str, tuple[str, str]], prefix: str) -> list[Any]:
    """The renamings for compressed layers.

    One renaming per layout and renamed tensor, whatever the number of layers: its pattern
    lists full names and is anchored at both ends, so that `layers.1` cannot match inside
    `layers.11`, nor a layer inside a longer path. A checkpoint saved with a head may be loaded
    into the bare base model and the other way round; transformers adjusts the prefix only after
    renaming, so every name is listed with and without it.

    Args:
        storages: module path in the model at hand -> storage kind and number format.
        prefix: the model's `base_model_prefix`.
    """
    found = []
    for kind in sorted(set(storages.values())):
        names = {name for name, storage in storages.items() if storage == kind}
        if prefix:
            bare = {name.removeprefix(f"{prefix}.") for name in names}
            names = bare | {f"{prefix}.{name}" for name in bare}
        pattern = "|".join(name.replace(".", r"\.") for name in sorted(names))
        for memory, disk in layout_of(*kind).renames().items():
            target = memory.replace(".", r"\.")
            found.append(
                SpectrimRenaming(
                    source_patterns=rf"^({pattern})\.{disk}{END}",
                    target_patterns=rf"\1\.{target}{END}",
                )
            )
    return found

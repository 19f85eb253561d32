"""Which layers of the checkpoint make up a layer of vLLM.

Files name layers relative to the base model (`layers.0.self_attn.q_proj`); vLLM gives the full
path of its own module (`model.layers.0.self_attn.qkv_proj`) and says which names it fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from spectrim.errors import ModelError
from spectrim.storage.table import LayerEntry, Table
from spectrim_vllm.assembly import unknown_numbers
from spectrim_vllm.stacking import Piece

__all__ = ["FUSED", "below", "is_compressed", "member_names", "pieces_of"]

FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Used where the model class of vLLM does not say itself what it fuses."""

_HELD = ("dense", "factored", "packed", "residual")
"""Storages whose tensors become one matrix, or two in a row."""

_BASES = ("model.language_model.", "language_model.model.", "model.", "transformer.", "")


def _relative(prefix: str) -> list[str]:
    """What a module path may be called in a file, the longest base first."""
    return [prefix.removeprefix(base) for base in _BASES if prefix.startswith(base)]


def member_names(prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Full paths of the checkpoint's layers inside the module at `prefix`."""
    parent, _, last = prefix.rpartition(".")
    members = {**FUSED, **fused}.get(last, (last,))
    return [f"{parent}.{member}" if parent else member for member in members]


def _entry(table: Table, prefix: str) -> tuple[str, LayerEntry] | None:
    for name in _relative(prefix):
        if name in table.layers:
            return name, table.layers[name]
    return None


def is_compressed(table: Table, prefix: str, fused: Mapping[str, Sequence[str]]) -> bool:
    """Whether any layer of the checkpoint inside the module at `prefix` is compressed."""
    return any(_entry(table, name) for name in (prefix, *member_names(prefix, fused)))


def pieces_of(
    table: Table, prefix: str, outputs: Sequence[int], fused: Mapping[str, Sequence[str]]
) -> tuple[Piece, ...]:
    """The pieces of a linear layer of vLLM.

    Args:
        table: from the `quantization_config`.
        prefix: vLLM's path of the module.
        outputs: outputs that one rank computes, by part.
        fused: vLLM's own table of fused names.

    Raises:
        ModelError: a fusion that cannot be followed.
    """
    whole = _entry(table, prefix)
    if whole is not None:
        return (_piece(*whole, tuple(outputs)),)
    names = member_names(prefix, fused)
    found = [_entry(table, name) for name in names]
    if len(names) != len(outputs):
        raise ModelError(
            f"{prefix} joins {len(names)} layers of the checkpoint ({', '.join(names)}) but vLLM "
            f"computes {len(outputs)} parts; this fusion is not known to spectrim"
        )
    return tuple(
        Piece(name, None, "dense", (size,)) if entry is None else _piece(*entry, (size,))
        for name, entry, size in zip(names, found, outputs, strict=True)
    )


def _piece(name: str, entry: LayerEntry, outputs: tuple[int, ...]) -> Piece:
    """A piece, of what this plug-in knows.

    Raises:
        ModelError: the folder is from a newer spectrim; names what is new in it.
    """
    if entry.storage not in _HELD:
        raise ModelError(
            f"{name} is stored {entry.storage}, and this spectrim-vllm knows {', '.join(_HELD)}; "
            "pip install --upgrade spectrim-vllm, or serve what spectrim export --dense writes"
        )
    found = Piece(name, entry.rank, entry.storage, outputs, entry.weights, entry.shape)
    strange = unknown_numbers(found)
    if strange:
        raise ModelError(
            f"{name} has weights {entry.weights}, whose {', '.join(strange)} numbers this "
            "spectrim-vllm cannot read; pip install --upgrade spectrim-vllm, or serve what "
            "spectrim export --dense writes"
        )
    return found


def below(table: Table, prefix: str) -> Iterable[str]:
    """Compressed layers of the table at a module path or anywhere below it."""
    starts = {name for name in _relative(prefix) if name}
    return [
        name
        for name in table.layers
        if any(name == start or name.startswith(f"{start}.") for start in starts)
    ]

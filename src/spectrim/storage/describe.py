"""A model in memory in the words of a file: names of its layers, and the table of what they are.

Saving (`attach`) and loading (`quantizer`) both need these, and neither needs the other for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectrim.errors import ArtifactError, ModelError
from spectrim.layers.layout import layout_of
from spectrim.layers.swap import compressed_layers
from spectrim.model.experts.layout import ExpertLayout
from spectrim.model.experts.unfold import expert_stacks
from spectrim.storage.table import ExpertsEntry, LayerEntry, Table


def relative_name(model: Any, name: str) -> str:
    """A module path without the prefix of the base model: `layers.0...` for `model.layers.0...`.

    Files name layers this way, because the same checkpoint is loaded with and without a head.
    """
    return name.removeprefix(f"{model.base_model_prefix}.") if _has_head(model) else name


def resolve_name(model: Any, relative: str) -> str | None:
    """The inverse of `relative_name`: the module path in this model, None if it has no such."""
    prefixed = f"{model.base_model_prefix}.{relative}"
    for name in (prefixed, relative) if _has_head(model) else (relative,):
        try:
            model.get_submodule(name)
        except AttributeError:
            continue
        return name
    return None


def _has_head(model: Any) -> bool:
    return model.base_model is not model


def table_of(model: Any, *, previous: Table) -> Table:
    """The table of the compressed layers that are in the model now; the rest from `previous`."""
    layers = {}
    for name, layer in compressed_layers(model).items():
        relative = relative_name(model, name)
        known = previous.layers.get(relative)
        # A layer that was refitted keeps unknown keys of its entry only if it is still the same.
        entry = _entry(layer)
        if known is None or any(getattr(known, f) != getattr(entry, f) for f in _ENTRY_FIELDS):
            known = entry
        layers[relative] = known
    experts = {
        relative_name(model, name): _experts_entry(stack.layout)
        for name, stack in expert_stacks(model).items()
    }
    return previous.model_copy(update={"layers": layers, "experts": experts})


def _experts_entry(layout: ExpertLayout) -> ExpertsEntry:
    return ExpertsEntry(
        experts=layout.experts,
        shape=(layout.out_features, layout.in_features),
        transposed=layout.transposed,
        parts=layout.parts,
    )


def expert_layouts(model: Any, table: Table) -> dict[str, ExpertLayout]:
    """Parameter in this model -> how the table says that it was taken apart.

    Raises:
        ArtifactError: the model has no such parameter.
    """
    found = {}
    for relative, entry in table.experts.items():
        path, _, leaf = relative.rpartition(".")
        owner = resolve_name(model, path)
        if owner is None or leaf not in model.get_submodule(owner)._parameters:
            raise ArtifactError(
                f"quantization_config in config.json names the experts {relative!r}, "
                f"{type(model).__name__} has no such parameter"
            )
        out_features, in_features = entry.shape
        found[f"{owner}.{leaf}" if owner else leaf] = ExpertLayout(
            entry.experts, out_features, in_features, entry.transposed, entry.parts
        )
    return found


def with_disk_names(model: Any, table: Table, conversions: Sequence[Any]) -> Table:
    """A table that says where the architecture stores its layers, if it is not where they are.

    Args:
        model: holds the layers.
        table: of its layers.
        conversions: of the architecture, as they apply on loading.
    """
    back = [step.reverse_transform() for step in reversed(conversions)]
    found = {}
    for relative in (*table.layers, *table.left_dense):
        key = f"{resolve_name(model, relative) or relative}.weight"
        for step in back:
            key, _ = step.rename_source_key(key)
        path = key.removesuffix(".weight")
        if path != relative and not path.endswith(f".{relative}"):
            found[relative] = path
    return table.model_copy(update={"on_disk": found})


_ENTRY_FIELDS = ("rank", "storage", "weights", "shape")


def _entry(layer: Any) -> LayerEntry:
    stated = layout_of(layer.storage, layer.weights).states_shape
    return LayerEntry(
        rank=layer.rank,
        storage=layer.storage,
        weights=layer.weights,
        shape=(layer.out_features, layer.in_features) if stated else None,
    )


def check_storable(layer: Any, name: str) -> None:
    """Refuse a rank at which a loader without spectrim could take a factor for the dense weight.

    That happens only where the stored tensor has the dense shape: a full-rank layer in native
    numbers, which costs more than the dense weight and is better left dense.
    """
    out_features, in_features = layer.out_features, layer.in_features
    layout = layout_of(layer.storage, layer.weights)
    stored = layout.shapes(out_features, in_features, layer.rank or 0)[layout.weight_key]
    if stored in {(out_features, in_features), (in_features, out_features)}:
        raise ModelError(
            f"{name} has rank {layer.rank} of {min(out_features, in_features)}: a full-rank layer "
            "cannot be told from a dense one on disk; leave this target dense"
        )

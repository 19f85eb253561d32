"""Describe a model that was compressed in this process, so that transformers can save it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spectrim.errors import ModelError
from spectrim.layers.layout import layout_of
from spectrim.layers.swap import compressed_layers
from spectrim.storage.table import LayerEntry, Provenance, Table

__all__ = ["attach", "check_storable", "relative_name", "resolve_name", "table_of"]


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
    return previous.model_copy(update={"layers": layers})


_ENTRY_FIELDS = ("rank", "storage", "weights", "shape")


def _entry(layer: Any) -> LayerEntry:
    native = layer.weights == "native"
    return LayerEntry(
        rank=layer.rank,
        storage=layer.storage,
        weights=layer.weights,
        shape=None if native else (layer.out_features, layer.in_features),
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


def attach(
    model: Any, *, left_dense: Iterable[str] = (), provenance: Provenance | None = None
) -> None:
    """Give a compressed model the configuration and quantizer it would have after loading.

    From then on `model.save_pretrained` writes a folder that `from_pretrained` reads. The table
    of layers is read off the model itself, again at every save.

    Args:
        model: a `PreTrainedModel` holding compressed layers. Without any it is left as it is,
            an ordinary dense model.
        left_dense: module paths of targets that kept their dense weight; they count in `keep`.
        provenance: what is to be known about the result; the spectrim version is added.

    Raises:
        ModelError: a layer has full rank.
    """
    from spectrim import __version__
    from spectrim.storage.config import SpectrimConfig
    from spectrim.storage.quantizer import SpectrimQuantizer

    layers = compressed_layers(model)
    if not layers:
        return
    for name, layer in layers.items():
        check_storable(layer, name)
    provenance = (provenance or Provenance()).model_copy(update={"spectrim_version": __version__})
    start = Table(
        left_dense=tuple(relative_name(model, name) for name in left_dense),
        provenance=provenance,
    )
    config = SpectrimConfig.from_table(table_of(model, previous=start))
    model.config.quantization_config = config
    model.hf_quantizer = SpectrimQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    _untie_head(model, layers)


def _untie_head(model: Any, layers: dict[str, Any]) -> None:
    """A compressed output head has no weight that could be shared with the embeddings."""
    head = model.get_output_embeddings()
    names = [name for name, layer in layers.items() if layer is head]
    if not names:
        return
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {
        target: source
        for target, source in tied.items()
        if not any(target.startswith(f"{name}.") for name in names)
    }

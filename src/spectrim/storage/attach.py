"""Describe a model that was compressed in this process, so that transformers can save it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spectrim import __version__
from spectrim.layers.swap import compressed_layers
from spectrim.storage.config import SpectrimConfig
from spectrim.storage.describe import check_storable, relative_name, table_of
from spectrim.storage.quantizer import SpectrimQuantizer
from spectrim.storage.resaving import take_casts
from spectrim.storage.table import Provenance, Table


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
    take_casts(model)
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

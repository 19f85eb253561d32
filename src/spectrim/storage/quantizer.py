"""Load and save compressed models through transformers, without remote code.

transformers lets a quantizer change the skeleton of a model before the weights arrive and rename
keys on the way in; on the way out it applies the same renamings backwards. We put compressed
layers into the skeleton and map `<linear>.weight` and `<linear>.bias` of the file to the tensors
below the compressed layer.

Importing this module registers both classes; `spectrim.registration` says when that happens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from spectrim.errors import ArtifactError, ModelError
from spectrim.layers.quantized import skeleton
from spectrim.layers.swap import compressed_layers, dense_shape, restore_dense, swap_in
from spectrim.model.experts.unfold import expert_stacks, fold, unfold
from spectrim.model.weights import get_module
from spectrim.storage.config import SpectrimConfig
from spectrim.storage.conversions import own_conversions, whole_layers
from spectrim.storage.describe import (
    check_storable,
    expert_layouts,
    resolve_name,
    table_of,
    with_disk_names,
)
from spectrim.storage.renaming import renamings, unfolded_conversions
from spectrim.storage.resaving import take_along, take_casts
from spectrim.storage.table import QUANT_METHOD, LayerEntry

register_quantization_config(QUANT_METHOD)(SpectrimConfig)


@register_quantizer(QUANT_METHOD)
class SpectrimQuantizer(HfQuantizer):
    """The hooks that `from_pretrained`, `save_pretrained` and `dequantize` call."""

    requires_calibration = True
    quantization_config: SpectrimConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._storages: dict[str, tuple[str, str]] = {}
        self._prefix = ""
        self._dtypes: dict[str, torch.dtype] = {}
        self._folding: list[Any] = []
        self._experts: tuple[str, ...] = ()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        from spectrim.storage.verify import check_files

        table = self.quantization_config.table
        try:
            unfold(model, expert_layouts(model, table))
        except ModelError as error:
            raise ArtifactError(f"quantization_config in config.json: {error}") from error
        for relative, entry in table.layers.items():
            name = resolve_name(model, relative)
            if name is None:
                _refuse_unless_head(model, relative)
            else:
                _swap_skeleton(model, name, entry)
        self._observe(model)
        self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
        if checkpoint_files:
            check_files(model, self, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from spectrim.storage.verify import check_orders

        check_orders(model)
        # transformers up to 5.20 leaves renamed tensors of a quantised model in the file's dtype.
        for name, p in model.named_parameters():
            p.data = p.data.to(self._dtypes.get(name, p.dtype))
        if self.quantization_config.dequantize:
            self._dequantize(model)
        else:
            take_casts(model)
            take_along(model)
        return model

    def _observe(self, model: Any) -> None:
        layers = compressed_layers(model)
        self._storages = {name: (layer.storage, layer.weights) for name, layer in layers.items()}
        self._prefix = model.base_model_prefix
        self._experts = tuple(expert_stacks(model))

    def get_weight_conversions(self) -> list[Any]:
        """Names on disk -> names in memory; transformers reverses them to save."""
        return renamings(self._storages, self._prefix)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Ours, and the architecture's but for what puts experts together that are layers now.

        The model is the one that was observed last; transformers up to 5.20 does not name it.
        """
        return self._without_folding(weight_conversions) + self.get_weight_conversions()

    def _without_folding(self, conversions: list[Any]) -> list[Any]:
        """Set the conversions aside that need the parameters of unfolded experts."""
        kept = unfolded_conversions(conversions, self._experts)
        self._folding = [c for c in conversions if c not in kept] or self._folding
        return kept

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called first by `save_pretrained`: bring table and renamings in line with the model."""
        self._observe(model)
        for name, layer in compressed_layers(model).items():
            check_storable(layer, name)
        steps = self._without_folding(own_conversions(model))
        steps = whole_layers(steps, compressed_layers(model))
        config = self.quantization_config
        config.table = with_disk_names(model, table_of(model, previous=config.table), steps)
        # The architecture's renamings stay in front: transformers applies ours last when
        # loading, so they see names in memory, and first when saving.
        model._weight_conversions = steps + self.get_weight_conversions()
        # No entry of our own: safetensors writes several in any order, and files would differ.
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name in compressed_layers(model):
            restore_dense(model, name, dtype=dtype)
        if expert_stacks(model):
            fold(model)
            # From now on the model is saved in the layout of its architecture's checkpoints.
            known = own_conversions(model)
            model._weight_conversions = known + [c for c in self._folding if c not in known]
        return model

    def is_serializable(self) -> bool:
        """Compressed models save like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets transformers' `Trainer` train all parameters, where all weights are parameters.

        With coded weights it would train norms and embeddings and nothing else; it asks for an
        adapter instead.
        """
        table = self.quantization_config.table
        return all(entry.weights == "native" for entry in table.layers.values())

    @property
    def is_compileable(self) -> bool:
        """Nothing in a compressed layer breaks a graph."""
        return True


def _swap_skeleton(model: Any, name: str, entry: LayerEntry) -> None:
    """Put an empty compressed layer where the configuration wants one."""
    old: Any = get_module(model, name)
    try:
        out_features, in_features = dense_shape(old, name)
        if (entry.rank or 0) > min(out_features, in_features):
            raise ModelError(
                f"{name} has rank {entry.rank}, more than its ({out_features}, {in_features})"
            )
        if entry.shape not in (None, (out_features, in_features)):
            raise ModelError(
                f"{name} maps {in_features} features to {out_features}, the configuration says "
                f"(out, in) = {entry.shape}"
            )
        layer = skeleton(
            entry.storage,
            entry.weights,
            (out_features, in_features),
            entry.rank,
            bias=old.bias is not None,
            dtype=old.weight.dtype,
        )
        check_storable(layer, name)
    except ModelError as error:
        raise ArtifactError(f"quantization_config in config.json: {error}") from error
    swap_in(model, name, layer)


def _refuse_unless_head(model: Any, relative: str) -> None:
    """A bare base model lacks what lies beside the base model, such as a compressed head."""
    bare = model.base_model is model
    if not bare or hasattr(model, relative.split(".")[0]):
        raise ArtifactError(
            f"quantization_config in config.json names the layer {relative!r}, "
            f"{type(model).__name__} has no such module"
        )

"""PEFT on compressed models: LoRA on a compressed layer as on the linear layer it stands for.

`target_modules=["q_proj"]` then means the layer whatever it is stored as. Merging joins the
adapter with the layer at the layer's rank and says what that lost; `spectrim.merge_adapter` can
grow it instead. Importing this module tells PEFT; `spectrim.registration` says when that happens.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import check_adapters_to_merge

from spectrim.errors import InputError, ModelError
from spectrim.layers.compressed import CompressedLayer
from spectrim.layers.swap import compressed_layers
from spectrim.refine.joining import check_joinable, join

PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Initial values that do not look into the dense weight."""

SHORTENED = (
    "adapters are merged at the rank that compressed layers have, which loses part of them; "
    "spectrim.merge_adapter(model) says how much, and with grow=True nothing is lost"
)


class LoraCompressed(Linear):
    """`layer(x) + scaling · B A x` for a compressed layer.

    Attributes:
        grow: whether merging takes rank k + r instead of k.
        lost: share of every merged adapter that the merged layer does not hold, by adapter.
    """

    def __init__(self, base_layer: Any, adapter_name: str, *args: Any, **kwargs: Any):
        start = getattr(kwargs.get("config"), "init_lora_weights", True)
        start = kwargs.get("init_lora_weights", start)
        if start not in PLAIN_STARTS:
            raise InputError(
                f"init_lora_weights={start!r} begins from a dense weight, and a compressed layer "
                f"has none; use one of {PLAIN_STARTS}"
            )
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.fan_in_fan_out = False  # whatever the layer replaced: its product is (out, in)
        self.grow = False
        self.lost: dict[str, float] = {}
        self._before: list[Any] = []

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """PEFT would warn that it does not know the layer."""
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[Any, Any]:
        """None of PEFT's variants: they compute with a dense weight."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Join adapters with the layer.

        Raises:
            ModelError: the layer has coded weights, or the adapter a bias of its own.
        """
        self.check_mergeable("a layer")
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            layer: Any = self.get_base_layer()
            A: Any = self.lora_A[name].weight
            B: Any = self.lora_B[name].weight
            update = B.detach().double() * self.scaling[name], A.detach()
            joined, lost = join(layer, *update, grow=self.grow)
            self._before.append(layer)
            self.base_layer = joined
            self.lost[name] = lost
            self.merged_adapters.append(name)
            if not self.grow:
                warnings.warn(SHORTENED, stacklevel=2)

    def check_mergeable(self, where: str) -> None:
        """Refuse what cannot be joined.

        Raises:
            ModelError: the layer has coded weights, or an adapter a bias of its own.
        """
        check_joinable(self.get_base_layer(), where)
        if any(up.bias is not None for up in self.lora_B.values()):
            raise ModelError(f"{where} has an adapter with a bias (lora_bias), which stays apart")

    def unmerge(self) -> None:
        """The layers as they were before merging, bit for bit."""
        while self.merged_adapters:
            self.lost.pop(self.merged_adapters.pop(), None)
            self.base_layer = self._before.pop()


_prepare = LoraModel._prepare_model


def _prepare_compressed(self: Any, peft_config: Any, model: Any) -> None:
    """What PEFT calls before it looks for layers: tell it ours.

    Raises:
        InputError: `all-linear`, which means linear modules, on layers without any.
    """
    _prepare(self, peft_config, model)
    layers = compressed_layers(model)
    if not layers:
        return
    peft_config._register_custom_module({CompressedLayer: LoraCompressed})
    rounded = [name for name, layer in layers.items() if layer.weights != "native"]
    if rounded and str(peft_config.target_modules).lower() == "all-linear":
        raise InputError(
            f"target_modules='all-linear' would leave out {len(rounded)} layers with coded "
            f"weights ({rounded[0]}, ...), whose parts are no linear modules; name the "
            "projections, as in ['q_proj', 'v_proj']"
        )


LoraModel._prepare_model = _prepare_compressed  # type: ignore[method-assign]

"""vLLM's side: the quantization config, and the linear method that serves factors.

Importing this module imports vLLM. Everything that computes lies in `stacking`, `assembly` and
`naming`, which do not; the interface used here is that of vLLM's `LinearMethodBase`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from spectrim.errors import ArtifactError, ModelError
from spectrim.storage.table import QUANT_METHOD, Table, parse_table
from spectrim_vllm.assembly import Assembly, stored_tensors
from spectrim_vllm.naming import below, is_compressed, pieces_of
from spectrim_vllm.stacking import Place, Stack

__all__ = ["SpectrimConfig", "SpectrimLinearMethod", "register_once"]

_SHARDS = {"q": 0, "k": 1, "v": 2}


class SpectrimConfig(QuantizationConfig):
    """The `quantization_config` of a compressed model, as vLLM wants to see it."""

    def __init__(self, table: Table):
        super().__init__()
        self.table = table

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpectrimConfig:
        """Validate what `config.json` says.

        Raises:
            ArtifactError: damaged, or of a newer format; names the version that is needed.
        """
        return cls(parse_table(config, source="quantization_config in config.json"))

    @classmethod
    def get_name(cls) -> str:
        """The word in `config.json`."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Factors are ordinary matrices, so every dtype that vLLM computes in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No kernels of our own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in `config.json`."""
        return []

    @property
    def fused(self) -> dict[str, list[str]]:
        """The fused names of the model class, which vLLM fills in; older versions do not."""
        return getattr(self, "packed_modules_mapping", None) or {}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Ours for layers with a compressed part, vLLM's dense one for other linear layers.

        Raises:
            ModelError: something compressed lies where vLLM has no linear layer.
        """
        if isinstance(layer, LinearBase):
            if is_compressed(self.table, prefix, self.fused):
                return SpectrimLinearMethod(self, prefix)
            return UnquantizedLinearMethod()
        names = list(below(self.table, prefix))
        # An attention asks for the scales of its cache; its linear layers ask for themselves.
        if names and "Attention" not in type(layer).__name__:
            raise ModelError(
                f"{prefix} is a {type(layer).__name__} in vLLM and holds {len(names)} compressed "
                f"layer(s) ({names[0]}, ...); only linear layers are served compressed: write "
                "dense weights with spectrim export --dense"
            )
        return None


class _Holder(nn.Module):
    """A place below a layer: for tensors that arrive by the checkpoint's paths, or for a matrix."""

    @classmethod
    def of(cls, matrix: Tensor) -> _Holder:
        """A matrix as vLLM's dense method wants to see a layer."""
        made = cls()
        made.weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
        return made


class SpectrimLinearMethod(LinearMethodBase):
    """Creates, loads and applies the factors of one layer of vLLM."""

    def __init__(self, config: SpectrimConfig, prefix: str):
        self.config = config
        self.prefix = prefix
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room, and places under the names that the checkpoint's tensors arrive with.

        The numbers go to two buffers, the stacked first matrix and the vector of all up matrices.
        The loader that vLLM offers is not used: it knows one rank per layer, not one per part.
        """
        pieces = pieces_of(
            self.config.table, self.prefix, output_partition_sizes, self.config.fused
        )
        place = _place(
            layer, (input_size, input_size_per_partition), (output_size, output_partition_sizes)
        )
        stack = Stack(pieces, input_size_per_partition, place)
        layer.spectrim_stack = stack
        layer.spectrim_assemblies = [Assembly(piece) for piece in pieces]
        first = torch.empty(stack.rows, input_size_per_partition, dtype=params_dtype)
        ups = torch.empty(stack.up_numbers, dtype=params_dtype)
        layer.register_buffer("spectrim_first", first, persistent=False)
        layer.register_buffer("spectrim_ups", ups, persistent=False)
        arriving = {name: kind for one in pieces for name, kind in stored_tensors(one).items()}
        for name, kind in arriving.items():
            data = torch.empty(0, dtype=kind or params_dtype)
            parameter = nn.Parameter(data, requires_grad=False)
            parameter.weight_loader = _loader(layer, name)  # type: ignore[attr-defined]
            parent, _, last = name.rpartition(".")
            if parent and not hasattr(layer, parent):
                setattr(layer, parent, _Holder())
            owner = getattr(layer, parent) if parent else layer
            owner.register_parameter(last, parameter)
        layer.spectrim_arriving = tuple(arriving)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Hand every matrix to vLLM's own dense method, which orders it for its products.

        Raises:
            ArtifactError: names the tensors that never came.
        """
        missing = [name for one in layer.spectrim_assemblies for name in one.missing()]
        if missing:
            raise ArtifactError(
                f"{self.prefix} lacks {len(missing)} tensor(s) of the checkpoint: "
                f"{', '.join(missing[:4])}; the folder is incomplete"
            )
        stack: Stack = layer.spectrim_stack
        ups = stack.ups_of(layer.spectrim_ups)
        matrices = [layer.spectrim_first, *(up.clone() for up in ups if up is not None)]
        holders = nn.ModuleList([_Holder.of(matrix) for matrix in matrices])
        del layer.spectrim_first, layer.spectrim_ups, layer.spectrim_assemblies
        for name in layer.spectrim_arriving:
            parent, _, last = name.rpartition(".")
            delattr(getattr(layer, parent) if parent else layer, last)
        for holder in holders:
            self.dense.process_weights_after_loading(holder)
        layer.spectrim_holders = holders
        rest = iter(holders[1:])
        # What `apply` reads is settled here: nothing of it is left to a compiled graph.
        layer.spectrim_ups_in_order = tuple(None if up is None else next(rest) for up in ups)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., inputs of this rank) -> (..., outputs of this rank).

        vLLM gathers or adds up what the ranks computed, and passes the bias where it belongs.
        """
        return layer.spectrim_stack.forward(
            x,
            layer.spectrim_holders[0],
            layer.spectrim_ups_in_order,
            bias,
            lambda z, holder: self.dense.apply(holder, z),
        )


def _place(layer: Any, inputs: tuple[int, int], outputs: tuple[int, list[int]]) -> Place:
    """What is split between how many ranks, from the sizes that vLLM gives."""
    input_ranks = inputs[0] // inputs[1]
    output_ranks = outputs[0] // sum(outputs[1])
    if input_ranks > 1 and output_ranks > 1:
        raise ModelError("a layer split over inputs and outputs at once is not known to spectrim")
    ranks = max(input_ranks, output_ranks)
    rank = 0
    if ranks > 1:
        rank = getattr(layer, "tp_rank", None)
        if rank is None:
            from vllm.distributed import get_tensor_model_parallel_rank

            rank = get_tensor_model_parallel_rank()
    return Place(rank, ranks, "in" if input_ranks > 1 else "out")


def _loader(layer: Any, name: str) -> Callable[..., None]:
    """What vLLM calls with each tensor of the checkpoint that belongs to one parameter."""

    def load(
        parameter: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: str | int | None = None
    ) -> None:
        index = _index(layer, name, loaded_shard_id)
        factors = layer.spectrim_assemblies[index].add(name, loaded_weight)
        if factors is not None:
            down, up = factors
            stack: Stack = layer.spectrim_stack
            stack.write(index, layer.spectrim_first, layer.spectrim_ups, down, up)

    return load


def _index(layer: Any, name: str, shard: Any) -> int:
    pieces = layer.spectrim_stack.pieces
    index = 0 if shard is None and len(pieces) == 1 else _SHARDS.get(shard, shard)
    if not isinstance(index, int) or not 0 <= index < len(pieces):
        raise ModelError(
            f"the tensor {name!r} of {', '.join(p.name for p in pieces)} came with the shard "
            f"{shard!r}; expected one of {len(pieces)}"
        )
    return index


@cache
def register_once() -> None:
    """Register with vLLM; vLLM calls its plugins more than once."""
    register_quantization_config(QUANT_METHOD)(SpectrimConfig)

"""As much of vLLM's interface as a quantisation plugin meets, for one rank at a time.

Written from the documented behaviour: a layer asks the quantization config for its method, the
method creates parameters, the model renames the checkpoint's tensors to the fused layers and hands
them to each parameter's own loader, and row-parallel layers give the bias to rank 0 only. What
the collectives do is left to the tests.
"""

import sys
from types import ModuleType

import torch
from torch import nn


class World:
    rank, size = 0, 1


class LinearMethodBase:
    def process_weights_after_loading(self, layer):
        """Nothing to do by default."""


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, weight_loader, **rest
    ):
        shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=rest["params_dtype"]))
        layer.weight.weight_loader = weight_loader

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """All parallel layers in one: `sizes` are the parts of the output, of all ranks together."""

    def __init__(self, n, sizes, *, config, prefix, splits, bias=False, kv_heads=None):
        super().__init__()
        self.tp_rank, self.tp_size = World.rank, World.size
        self.splits, self.full_sizes = splits, sizes
        ranks_out = World.size if splits == "out" else 1
        self.output_partition_sizes = [size // ranks_out for size in sizes]
        if kv_heads is not None and kv_heads < ranks_out:
            # Key-value heads are repeated where there are fewer of them than ranks.
            own = sizes[1] // kv_heads
            self.output_partition_sizes[1:] = [own, own]
        inputs = n // World.size if splits == "in" else n
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs,
            output_partition_sizes=self.output_partition_sizes,
            input_size=n,
            output_size=sum(self.output_partition_sizes) * ranks_out,
            params_dtype=torch.get_default_dtype(),
            weight_loader=self.load_dense,
        )
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(self.output_partition_sizes)))
            self.bias.weight_loader = self.load_dense

    def load_dense(self, parameter, tensor, shard=None):
        index = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
        if self.splits == "in":
            if tensor.ndim == 2:
                width = parameter.shape[1]
                tensor = tensor[:, self.tp_rank * width : (self.tp_rank + 1) * width]
            parameter.data.copy_(tensor)
            return
        own = self.output_partition_sizes[index]
        distinct = tensor.shape[0] // own
        place = (
            self.tp_rank // (self.tp_size // distinct)
            if distinct < self.tp_size
            else (self.tp_rank)
        )
        start = sum(self.output_partition_sizes[:index])
        parameter.data[start : start + own].copy_(tensor[place * own : (place + 1) * own])

    def forward(self, x):
        bias = self.bias if self.splits == "out" or self.tp_rank == 0 else None
        return self.quant_method.apply(self, x, bias)


class ParallelLMHead(nn.Module):
    """Not a linear layer in vLLM."""


STACKED = (
    (".qkv_proj", ".q_proj", "q"),
    (".qkv_proj", ".k_proj", "k"),
    (".qkv_proj", ".v_proj", "v"),
    (".gate_up_proj", ".gate_proj", 0),
    (".gate_up_proj", ".up_proj", 1),
)


def load_weights(model, weights):
    """As vLLM's decoder models do it."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        for fused, single, shard in STACKED:
            if single in name:
                parameter = parameters[name.replace(single, fused)]
                parameter.weight_loader(parameter, tensor, shard)
                break
        else:
            parameters[name].weight_loader(parameters[name], tensor)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)


class Block(nn.Module):
    """The linear layers of a decoder block, named as vLLM names them."""

    def __init__(self, config, *, hidden, heads, kv, wide, bias=False, kv_heads=None):
        super().__init__()
        prefix = "model.layers.0"
        make = lambda *args, path, **more: LinearBase(  # noqa: E731
            *args, config=config, prefix=f"{prefix}.{path}", **more
        )
        attention, mlp = nn.Module(), nn.Module()
        attention.qkv_proj = make(
            hidden, [heads, kv, kv], path="self_attn.qkv_proj", splits="out", bias=bias,
            kv_heads=kv_heads,
        )  # fmt: skip
        attention.o_proj = make(heads, [hidden], path="self_attn.o_proj", splits="in", bias=bias)
        mlp.gate_up_proj = make(hidden, [wide, wide], path="mlp.gate_up_proj", splits="out")
        mlp.down_proj = make(wide, [hidden], path="mlp.down_proj", splits="in")
        self.self_attn, self.mlp = attention, mlp


REGISTERED = {}


def register_quantization_config(name):
    def wrap(cls):
        if name in REGISTERED:
            raise ValueError(f"{name} exists already")
        assert issubclass(cls, QuantizationConfig)
        REGISTERED[name] = cls
        return cls

    return wrap


def install(monkeypatch):
    """Put the fake where `import vllm` finds it, and forget the plugin's earlier imports."""
    contents = {
        "vllm": {},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: World.rank},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "vllm.model_executor.layers.quantization": {
            "register_quantization_config": register_quantization_config
        },
        "vllm.model_executor.layers.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig
        },
    }
    REGISTERED.clear()
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "spectrim_vllm.quantization", raising=False)

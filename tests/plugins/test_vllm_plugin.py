"""Registration and loading through the interface of vLLM, one fake rank at a time."""

import json
import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import spectrim_vllm
from plugins import fake_vllm
from spectrim.errors import ArtifactError, ModelError
from storage_cases import compressed

HOME = Path(__file__).parents[2] / "plugins" / "vllm"


@pytest.fixture
def plugin(monkeypatch):
    fake_vllm.install(monkeypatch)
    assert spectrim_vllm.register()
    yield import_module("spectrim_vllm.quantization")
    fake_vllm.World.rank, fake_vllm.World.size = 0, 1
    sys.modules.pop("spectrim_vllm.quantization", None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A compressed model, its configuration and its stored tensors, bias included."""
    folder = tmp_path_factory.mktemp("served")
    model = compressed("qwen2")
    model.save_pretrained(folder)
    return (
        model,
        model.config.quantization_config.to_dict(),
        load_file(folder / "model.safetensors"),
    )


def test_the_plugin_without_vllm_does_nothing_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert spectrim_vllm.register() is False
    assert "cannot be served" in caplog.text


def test_importing_the_plugin_is_light():
    code = (
        "import sys; import spectrim_vllm\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    path = str(HOME / "src")
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"], check=True
    )


@pytest.mark.parametrize("broken", ["LinearBase", "register_quantization_config"])
def test_another_version_of_vllm_never_stops_its_start(broken, monkeypatch):
    fake_vllm.install(monkeypatch)
    for name in ("linear", "quantization"):
        module = sys.modules[f"vllm.model_executor.layers.{name}"]
        if hasattr(module, broken):
            monkeypatch.delattr(module, broken)
    assert spectrim_vllm.register() is False


def test_the_entry_point_names_the_function():
    # Read as text: the standard library knows TOML only from Python 3.11 on.
    project = (HOME / "pyproject.toml").read_text()
    group = '[project.entry-points."vllm.general_plugins"]'
    assert f'{group}\nspectrim = "spectrim_vllm:register"\n' in project
    assert callable(spectrim_vllm.register)


def test_registration_is_done_once(plugin):
    assert spectrim_vllm.register() and spectrim_vllm.register()
    assert fake_vllm.REGISTERED["spectrim"] is plugin.SpectrimConfig
    assert plugin.SpectrimConfig.get_name() == "spectrim"


def block(plugin, config, model):
    c = model.config
    size = c.hidden_size // c.num_attention_heads
    return fake_vllm.Block(
        plugin.SpectrimConfig.from_config(config),
        hidden=c.hidden_size,
        heads=size * c.num_attention_heads,
        kv=size * c.num_key_value_heads,
        wide=c.intermediate_size,
        kv_heads=c.num_key_value_heads,
        bias=True,
    )


def own(tensors):
    """The tensors of the first block's linear layers."""
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.") and "norm" not in name
    }
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_is_served_as_spectrim_computes_it(plugin, checkpoint, ranks):
    model, config, tensors = checkpoint
    layer = model.model.layers[0]
    hidden = model.config.hidden_size
    x = torch.randn(3, hidden)
    heads = layer.self_attn.o_proj.in_features
    wide = layer.mlp.down_proj.in_features
    o, d = torch.randn(3, heads), torch.randn(3, wide)
    stored = own(tensors) | {"model.layers.0.self_attn.o_proj.bias": torch.randn(hidden)}
    outputs = []
    for rank in range(ranks):
        fake_vllm.World.rank, fake_vllm.World.size = rank, ranks
        served = torch.nn.Module()
        served.model = torch.nn.Module()
        served.model.layers = torch.nn.ModuleList([block(plugin, config, model)])
        fake_vllm.load_weights(served, stored.items())
        part = served.model.layers[0]
        assert isinstance(part.self_attn.qkv_proj.quant_method, plugin.SpectrimLinearMethod)
        outputs.append(
            (
                part.self_attn.qkv_proj(x).split(
                    part.self_attn.qkv_proj.output_partition_sizes, dim=-1
                ),
                part.mlp.gate_up_proj(x).chunk(2, dim=-1),
                part.self_attn.o_proj(o.chunk(ranks, dim=-1)[rank]),
                part.mlp.down_proj(d.chunk(ranks, dim=-1)[rank]),
            )
        )
    with torch.no_grad():
        attention, mlp = layer.self_attn, layer.mlp
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            expected = getattr(attention, name)(x)
            found = torch.cat([out[0][i] for out in outputs], dim=-1)
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4), name
        for i, name in enumerate(("gate_proj", "up_proj")):
            found = torch.cat([out[1][i] for out in outputs], dim=-1)
            assert torch.allclose(found, getattr(mlp, name)(x), atol=1e-4, rtol=1e-4), name
        bias = stored["model.layers.0.self_attn.o_proj.bias"]
        total = sum(out[2] for out in outputs)
        assert torch.allclose(total, attention.o_proj(o) + bias, atol=1e-4, rtol=1e-4)
        total = sum(out[3] for out in outputs)
        assert torch.allclose(total, mlp.down_proj(d), atol=1e-4, rtol=1e-4)


def test_untouched_layers_are_vllms_own(plugin):
    config = plugin.SpectrimConfig.from_config({"layers": {}})
    layer = fake_vllm.LinearBase(8, [8], config=config, prefix="model.x", splits="out")
    assert type(layer.quant_method) is fake_vllm.UnquantizedLinearMethod
    assert config.get_quant_method(fake_vllm.ParallelLMHead(), "lm_head") is None


def test_a_compressed_head_or_expert_is_refused(plugin):
    entry = {"rank": 2, "storage": "factored"}
    config = plugin.SpectrimConfig.from_config({"layers": {"lm_head": entry}})
    with pytest.raises(ModelError, match=r"ParallelLMHead.*export --dense"):
        config.get_quant_method(fake_vllm.ParallelLMHead(), "lm_head")
    experts = {"layers": {"layers.0.mlp.experts.0.up_proj": entry}}
    config = plugin.SpectrimConfig.from_config(experts)
    with pytest.raises(ModelError, match="only linear layers"):
        config.get_quant_method(torch.nn.Module(), "model.layers.0.mlp.experts")


def test_a_newer_format_is_refused(plugin):
    with pytest.raises(ArtifactError, match="format_version 7"):
        plugin.SpectrimConfig.from_config({"format_version": 7, "layers": {}})


def test_an_incomplete_checkpoint_is_refused(plugin, checkpoint):
    model, config, tensors = checkpoint
    served = torch.nn.Module()
    served.model = torch.nn.Module()
    served.model.layers = torch.nn.ModuleList([block(plugin, config, model)])
    stored = own(tensors)
    lost = next(name for name in stored if name.endswith("down.weight"))
    del stored[lost]
    with pytest.raises(ArtifactError, match=lost.removeprefix("model.").replace(".", r"\.")):
        fake_vllm.load_weights(served, stored.items())


def test_the_plugin_is_short_and_names_what_was_tested():
    assert all(len(p.read_text().splitlines()) <= 300 for p in HOME.rglob("*.py"))
    result = json.loads((HOME.parents[1] / "benchmarks/results/vllm.json").read_text())
    for row in result["rows"]:
        assert row["largest_difference_nats"] <= result["tolerance_nats"], row["name"]
        assert row["warnings"] == []
    assert {"dense", "factored", "packed", "int8", "int4"} <= {r["name"] for r in result["rows"]}

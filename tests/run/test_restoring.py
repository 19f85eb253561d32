"""A quantised checkpoint becomes the ordinary model that its codes spell out, and nothing else.

Codes are made here, by hand or by the quantiser's own library, and spelled out again independently.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import POSITIONS, VOCAB, tiny, windows
from jobs import logits
from spectrim import api
from spectrim.errors import InputError, ModelError
from spectrim.layers.swap import compressed_layers
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions

FP32 = RunOptions(dtype="float32", dequantize=True)
E4M3_LARGEST = 448.0
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])


def published(folder, code, quantization):
    """Replace tensors of a saved model by codes, say so in its configuration; what they stand for.

    `code(name, W)` gives the tensors in place of one, and their value.
    """
    file = folder / "model.safetensors"
    made, expected = {}, {}
    for name, W in load_file(file).items():
        codes, expected[name] = code(name, W) if "proj" in name else ({name: W}, W)
        made |= codes
    save_file(made, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, expected


def blocks_of(W, rows, columns):
    m, n = W.shape
    return W.reshape(m // rows, rows, n // columns, columns)


def fp8(folder):
    """Two by eight numbers share a scale, as 128 by 128 do in DeepSeek's checkpoints."""
    model, _ = tiny("llama", intermediate_size=56)
    model.save_pretrained(folder)

    def code(name, W):
        parts = blocks_of(W, 2, 8)
        scale = parts.abs().amax((1, 3), keepdim=True) / E4M3_LARGEST
        codes = (parts / scale).to(torch.float8_e4m3fn)
        made = {name: codes.reshape(W.shape), f"{name}_scale_inv": scale[:, 0, :, 0].contiguous()}
        return made, (codes.float() * scale).reshape(W.shape)

    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [2, 8]}
    return published(folder, code, stated)


def mxfp4(folder):
    """The experts of a small gpt-oss: 32 codes of four bits and one power of two."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = GptOssForCausalLM(
        GptOssConfig(vocab_size=VOCAB, num_experts_per_tok=2, pad_token_id=0, **sizes, **heads)
    )
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def code(name, W):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: W}, W
        experts, n, m = W.shape
        codes = torch.randint(0, 256, (experts, m, n // 32, 16), generator=generator)
        powers = torch.randint(120, 126, (experts, m, n // 32), generator=generator)
        made = {f"{name}_blocks": codes.to(torch.uint8), f"{name}_scales": powers.to(torch.uint8)}
        numbers = torch.stack([E2M1[codes % 16], E2M1[codes // 16]], -1).flatten(-2)
        numbers = numbers * torch.exp2(powers - 127.0)[..., None]
        return made, numbers.flatten(-2).transpose(1, 2)

    return published(folder, code, {"quant_method": "mxfp4"})


def compressed_tensors(folder):
    """Integers of eight bits with a scale per row, as `compressed-tensors` writes them."""
    pytest.importorskip("compressed_tensors")
    tiny("llama")[0].save_pretrained(folder)

    def code(name, W):
        scale = W.abs().amax(1, keepdim=True) / 127
        codes = (W / scale).round().to(torch.int8)
        return {name: codes, f"{name}_scale": scale}, codes.float() * scale

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    stated = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return published(folder, code, stated)


def nvfp4(folder):
    """Sixteen codes of four bits share a scale in FP8, and all of them one in fp32."""
    pytest.importorskip("compressed_tensors")
    model, _ = tiny("llama", hidden_size=48, intermediate_size=64)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def code(name, W):
        m, n = W.shape
        codes = torch.randint(0, 256, (m, n // 2), generator=generator)
        scale = torch.rand(m, n // 16, generator=generator).add(0.5).to(torch.float8_e4m3fn)
        numbers = torch.stack([E2M1[codes % 16], E2M1[codes // 16]], -1)
        numbers = numbers.reshape(m, n // 16, 16) * (scale.float() / 8)[..., None]
        made = {
            f"{name}_packed": codes.to(torch.uint8),
            f"{name}_scale": scale,
            f"{name}_global_scale": torch.tensor([8.0]),
        }
        return made, numbers.reshape(m, n)

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
    stated = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights | {"group_size": 16}}},
        "ignore": ["lm_head"],
    }
    return published(folder, code, stated)


@pytest.mark.parametrize("publish", [fp8, mxfp4, compressed_tensors, nvfp4])
def test_the_weights_are_what_the_codes_say(publish, tmp_path):
    folder, expected = publish(tmp_path / "m")
    loaded = load_model(folder, FP32, whole=True)
    found = loaded.model.state_dict()
    for name, W in expected.items():
        assert torch.allclose(found[name], W, rtol=1e-6, atol=0), name
    assert loaded.stored_dtype is torch.bfloat16
    assert "quantised" in loaded.notes[0] and "stays lost" in loaded.notes[0]
    assert getattr(loaded.model.config, "quantization_config", None) is None
    # Saved as it is now, it is an ordinary model.
    loaded.model.save_pretrained(tmp_path / "plain")
    again = load_model(tmp_path / "plain", RunOptions(dtype="float32"), whole=True).model
    ids = windows(2) % VOCAB
    assert torch.equal(logits(again, ids), logits(loaded.model, ids))


def test_a_result_is_that_of_the_restored_model_and_says_where_its_weights_come_from(tmp_path):
    folder, expected = fp8(tmp_path / "m")
    model, _ = tiny("llama", intermediate_size=56)
    model.load_state_dict(expected)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    options = {"recipe": "svd-llm", "keep": 0.6, "text": windows(8)}
    api.compress(folder, dequantize=True, output=tmp_path / "a", **options)
    api.compress(tmp_path / "plain", output=tmp_path / "b", **options)
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "spectrim"
    report = json.loads((tmp_path / "a" / "spectrim_report.json").read_text(encoding="utf-8"))
    note = next(note for note in report["notes"] if "quantised (fp8)" in note)
    assert note in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    one, other = (load_model(tmp_path / n) for n in "ab")
    assert compressed_layers(one.model).keys() == compressed_layers(other.model).keys()
    # The base of one was rounded to bf16 before it was cut, that of the other was not.
    ids = windows(3, seed=9)
    distance = (logits(one.model, ids) - logits(other.model, ids)).norm()
    assert distance < 0.05 * logits(other.model, ids).norm()


def test_bitsandbytes_is_what_its_own_library_multiplies_out(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny("llama", hidden_size=64, intermediate_size=64, vocab_size=VOCAB)[0].save_pretrained(
        tmp_path / "m"
    )
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config)
    rounded.save_pretrained(tmp_path / "q")
    loaded = load_model(tmp_path / "q", FP32, whole=True)
    for name, layer in rounded.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            found = loaded.model.get_submodule(name).weight
            assert type(loaded.model.get_submodule(name)) is torch.nn.Linear
            assert torch.allclose(found, W.float(), rtol=1e-2, atol=1e-3), name


def gguf_file(path, model):
    """A Qwen2 model as llama.cpp's own library writes it, in blocks of 32 codes of eight bits."""
    gguf = pytest.importorskip("gguf")
    c = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*(chr(ord("!") + i) for i in range(c.vocab_size - 1)), "!!"])
    writer.add_token_types([1] * c.vocab_size)
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, c.num_hidden_layers)
    expected = {}
    for name, tensor in model.state_dict().items():
        W = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if "proj.weight" in name else None
        if kind is not None:
            codes = gguf.quants.quantize(W, kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(codes, kind))
            W = codes
        else:
            expected[name] = tensor
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), W, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_a_gguf_file_is_a_model_like_any_other(tmp_path):
    model, _ = tiny("qwen2", hidden_size=64, intermediate_size=96)
    path = tmp_path / "tiny-q8_0.gguf"
    expected = gguf_file(path, model)
    with pytest.raises(ModelError, match="--dequantize"):
        load_model(path)
    loaded = load_model(path, FP32, whole=True)
    found = loaded.model.state_dict()
    for name, W in expected.items():
        assert torch.allclose(found[name], W, rtol=1e-5, atol=1e-7), name
    result = api.compress(
        path, recipe="svd-llm", keep=0.6, dequantize=True, text=windows(8), output=tmp_path / "o"
    )
    assert any("quantised (GGUF)" in note for note in result.report["notes"])
    assert (tmp_path / "o" / "tokenizer.json").is_file()
    assert str(tmp_path) not in (tmp_path / "o" / "README.md").read_text(encoding="utf-8")


def test_what_cannot_be_restored_is_refused_by_name(tmp_path):
    tiny("llama")[0].save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="is not quantised"):
        load_model(tmp_path / "plain", FP32, whole=True)
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    gptq, _ = published(tmp_path / "plain", lambda name, W: ({name: W}, W), stated)
    with pytest.raises(ModelError, match=r"cannot restore .*plain.*\(gptq\)"):
        load_model(gptq, FP32, whole=True)
    with pytest.raises(ModelError, match="restore such weights with --dequantize"):
        load_model(gptq, whole=True)
    with pytest.raises(InputError, match="out of core"):
        api.compress(gptq, dequantize=True, out_of_core=True, output=tmp_path / "o")
    with pytest.raises(InputError, match="model object"):
        api.compress(tiny("llama")[0], dequantize=True, recipe="svd")


def test_a_tensor_without_a_place_is_not_dropped(tmp_path):
    folder, _ = fp8(tmp_path / "m")
    file = folder / "model.safetensors"
    held = load_file(file) | {"model.layers.7.mlp.up_proj.weight": torch.zeros(3, 3)}
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"without a place.*layers\.7"):
        load_model(folder, FP32, whole=True)

"""What is not, whole, a 16- or 32-bit causal language model is refused before a weight is read."""

import json
import shutil
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import family, tiny
from spectrim import api
from spectrim.errors import InputError, ModelError
from spectrim.run import loading
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny("llama")[0].save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path, monkeypatch):
    def unread(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "_load_weights", unread)
    return shutil.copytree(source, tmp_path / "model")


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, match, error=ModelError, **options):
    with pytest.raises(error, match=match) as caught:
        api.compress(folder, keep=0.5, recipe="svd", **options)
    assert "\n" not in str(caught.value)


QUANTIZED = {
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "quark": {"quant_method": "quark"},
    "of-next-year": {"quant_method": "of-next-year"},
    "unknown method": {"bits": 3},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantised_model_is_refused_by_its_method(folder, method):
    edit(folder, quantization_config=QUANTIZED[method])
    refused(folder, rf"quantised \({method}.*give the model it was made from")
    with pytest.raises(ModelError, match="quantised"):
        api.survey(folder, recipe="svd-llm")
    with pytest.raises(ModelError, match="quantised"):
        api.estimate(folder, recipe="svd", keep=0.5)


def test_a_method_may_be_stated_elsewhere(folder):
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    refused(folder, "GPTQ, quantize_config.json")
    edit(folder, compression_config={"quant_method": "compressed-tensors"})
    refused(folder, "compressed-tensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_codes_that_nothing_declares_are_seen_in_the_headers(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, rf"quantised: '{name}'")


def test_every_tensor_of_a_checkpoint_is_used_or_it_is_refused(folder):
    edit(folder, num_hidden_layers=1)
    refused(folder, r"9 tensors .*no place for \(model\.layers\.1\..*config\.json")
    edit(folder, num_hidden_layers=3)
    refused(folder, r"lacks 9 weights .*model\.layers\.2\.")
    edit(folder, num_hidden_layers=2, intermediate_size=50)
    refused(folder, r"config\.json does not describe the weights: model\.layers\.0\.mlp")


def test_buffers_that_are_computed_may_lie_in_the_file(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    notes = api.compress(folder, keep=0.5, recipe="svd").report["notes"]
    assert notes == ["the model has no tokenizer, and neither has the result"]


def test_what_a_class_ignores_is_noted(source, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    folder = shutil.copytree(source, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.ones(5, 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"no place for \(mtp\.fc\.weight\)")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    report = api.compress(folder, keep=0.5, recipe="svd").report
    assert any(
        "1 tensors of the checkpoint (100 bytes, mtp.fc.weight)" in n for n in report["notes"]
    )


WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 67,
    "pad_token_id": 0,
}
OTHERS = {
    "WhisperForConditionalGeneration": ("whisper", WHISPER),
    "BertForMaskedLM": ("bert", {}),
    "BertModel": ("bert", {}),
    "LlamaForSequenceClassification": ("llama", {}),
    "Qwen2ForTokenClassification": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen2Model": ("qwen2", {"tie_word_embeddings": True}),
    "T5ForConditionalGeneration": ("t5", {"d_model": 32, "d_ff": 32, "num_layers": 1}),
    "ViTForImageClassification": ("vit", {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_another_kind_is_called_by_its_name(tmp_path, kind):
    model_type, sizes = OTHERS[kind]
    family(model_type, kind, **sizes).save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", rf"is a {kind}, .*spectrim compresses causal language models")


def test_the_whole_reason_of_a_bad_configuration_is_in_one_line(folder):
    edit(folder, hidden_size="big")
    refused(folder, r"config\.json cannot be used: .*hidden_size.*expected int, got str")
    edit(folder, hidden_size=41)
    refused(folder, r"cannot be built as a causal language model: .+|config\.json cannot be used")


def test_an_own_mistake_does_not_read_as_a_bad_checkpoint(source, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise AttributeError("ours")

    monkeypatch.setattr("spectrim.run.out_of_core.unit_names", broken)
    with pytest.raises(AttributeError, match="ours"):
        load_model(source, RunOptions(out_of_core=True))
    api.compress(source, keep=0.5, recipe="svd", output=tmp_path / "out")
    monkeypatch.setattr("spectrim.storage.verify.read_header", None)
    with pytest.raises(TypeError, match="not callable"):
        load_model(tmp_path / "out")


def test_folders_and_files_of_other_kinds_are_called_what_they_are(tmp_path):
    adapter, gguf, empty = tmp_path / "adapter", tmp_path / "gguf", tmp_path / "empty"
    for place in (adapter, gguf, empty):
        place.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (gguf / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(adapter, "PEFT adapter.*merge it first")
    refused(gguf, "GGUF file.*16- or 32-bit model")
    refused(gguf / "model-Q4_K_M.gguf", "GGUF file")
    refused(empty, "no config.json .*empty")
    (empty / "params.json").write_text("{}")
    refused(empty, "no config.json .*found params.json")
    refused(empty / "params.json", "is a file; give the folder")


def test_a_wrong_path_is_answered_at_once_without_the_hub(source, monkeypatch):
    def asked(*_args, **_kwargs):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", asked)
    started = time.perf_counter()
    refused(source.parent / "lama", rf"there is no folder .*; there is '{source}'")
    refused("./no/such/folder", "there is no folder")
    refused("~/model", "the shell expands")
    refused("models/llama-7b", r"no such folder.*cannot be asked \(Network is unreachable\)")
    assert time.perf_counter() - started < 5


def test_a_tokenizer_that_is_there_is_never_lost(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model":')
    refused(folder, r"tokenizer of .*\(tokenizer\.json\) cannot be loaded: ")
    (folder / "tokenizer.json").unlink()
    stated = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "vocab.txt").write_text("[UNK]\na\n")
    refused(folder, r"tokenizer of .*cannot be loaded: .+install what it needs")


def test_compressed_models_say_so(source, tmp_path):
    api.compress(source, keep=0.5, recipe="svd", output=tmp_path / "out")
    with pytest.raises(InputError, match="already compressed; start from the original"):
        api.compress(tmp_path / "out", keep=0.5, recipe="svd")

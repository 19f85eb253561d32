"""LoRA on compressed models: PEFT sees a layer as the linear layer it stands for."""

import pytest
import torch

import spectrim
from architectures import windows
from jobs import logits
from spectrim.errors import InputError, ModelError
from spectrim.layers.quantized import quantize_layer
from spectrim.layers.swap import compressed_layers
from spectrim.refine.joining import join
from storage_cases import compressed, save

peft = pytest.importorskip("peft")

ATTENTION = {"llama": ["q_proj", "o_proj"], "gpt2": ["c_attn"]}


def adapted(name="llama", targets=None, *, rank=2, seed=0, model=None, **options):
    """A compressed tiny model with random adapters, which are not zero."""
    model = compressed(name) if model is None else model
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets or ATTENTION[name], **options
    )
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, p in wrapped.named_parameters():
        if "lora_" in key:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return wrapped


def integer_model(weights="int8"):
    model = compressed()
    for layer in compressed_layers(model).values():
        quantize_layer(layer, weights, dtype=torch.float32)
    spectrim_attach(model)
    return model


def spectrim_attach(model):
    from spectrim.storage.attach import attach

    attach(model)


@pytest.mark.parametrize("name", ATTENTION)
def test_an_adapter_adds_its_product_to_the_layer(name):
    wrapped = adapted(name)
    layers = [m for m in wrapped.modules() if hasattr(m, "check_mergeable")]
    named = [n for n in compressed_layers(wrapped) if n.split(".")[-2] in ATTENTION[name]]
    assert len(layers) == len(named) > 0
    for layer in layers:
        x = torch.randn(3, layer.in_features)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + 2 * x @ A.T @ B.T)


@pytest.mark.parametrize("kind", ["factored", "packed"])
def test_joining_takes_the_best_of_the_layers_rank_and_says_what_is_lost(kind):
    layer = next(iter(compressed_layers(compressed(kinds=(kind,)).double()).values()))
    m, n, k = layer.out_features, layer.in_features, layer.rank
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(m, 3, generator=generator, dtype=torch.float64)
    down = torch.randn(3, n, generator=generator, dtype=torch.float64)
    before = layer.dense_weight().clone()
    wanted = before + up @ down
    joined, lost = join(layer, up, down)
    U, s, Vh = torch.linalg.svd(wanted)
    torch.testing.assert_close(joined.dense_weight(), U[:, :k] * s[:k] @ Vh[:k])
    assert lost == pytest.approx(float(s[k:].norm() / (up @ down).norm()), rel=1e-6)
    grown, nothing = join(layer, up, down, grow=True)
    assert (grown.rank, grown.storage) == (k + 3, kind)
    torch.testing.assert_close(grown.dense_weight(), wanted)
    assert nothing < 1e-10
    assert torch.equal(layer.dense_weight(), before)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_grown_merge_computes_the_same_and_survives_the_folder(name, tmp_path):
    from transformers import AutoModelForCausalLM

    wrapped = adapted(name)
    ids = windows(2, 9)
    expected = logits(wrapped, ids)
    ranks = {n: layer.rank for n, layer in compressed_layers(wrapped.get_base_model()).items()}
    merged, lost = spectrim.merge_adapter(wrapped, grow=True)
    assert lost and max(lost.values()) < 1e-4
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    for path in lost:
        assert compressed_layers(merged)[path].rank == ranks[f"{path}.base_layer"] + 2
    save(merged, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-4, atol=1e-4)


def test_pefts_own_merge_keeps_the_ranks_warns_and_can_be_undone():
    wrapped = adapted()
    ids = windows(2, 9)
    expected = logits(wrapped, ids)
    with pytest.warns(UserWarning, match=r"spectrim\.merge_adapter"):
        wrapped.merge_adapter()
    assert not torch.allclose(logits(wrapped, ids), expected, atol=1e-4)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped, ids), expected)
    with pytest.warns(UserWarning, match="rank"):
        merged = wrapped.merge_and_unload()
    assert all(layer.rank == 5 for layer in compressed_layers(merged).values())


def test_all_linear_means_the_factors_and_merging_loses_nothing():
    model = compressed()
    inside = {n: p.shape for n, p in model.named_parameters()}
    wrapped = adapted(model=model, targets="all-linear")
    ids = windows(2, 9)
    expected = logits(wrapped, ids)
    merged, lost = spectrim.merge_adapter(wrapped)
    assert not lost
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    assert {n: p.shape for n, p in merged.named_parameters()} == inside


def test_only_the_adapter_trains_beside_integer_weights_and_is_never_merged(tmp_path):
    wrapped = adapted(model=integer_model())
    ids = windows(2, 9)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert all(float(p.grad.norm()) > 0 for p in wrapped.parameters() if p.grad is not None)
    before = logits(wrapped, ids)
    with pytest.raises(ModelError, match=r"_proj.*int8"):
        spectrim.merge_adapter(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(integer_model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, ids), before)


def test_the_trainer_refuses_to_train_what_little_is_no_integer():
    from transformers.trainer_utils import validate_quantization_for_training

    validate_quantization_for_training(compressed())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(integer_model())
    validate_quantization_for_training(adapted(model=integer_model()))


def test_all_linear_is_refused_where_it_would_pass_over_layers():
    with pytest.raises(InputError, match=r"all-linear.*name the projections"):
        adapted(model=integer_model(), targets="all-linear")


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_variants_that_need_a_dense_weight_are_refused(options):
    with pytest.raises((InputError, ValueError), match=r"dense weight|variant"):
        adapted(**options)

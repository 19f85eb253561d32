"""What no budget counts, against sums over the tensors of a checkpoint."""

from __future__ import annotations

from collections import Counter

import pytest

from architectures import family, tiny, windows
from spectrim import api
from spectrim.cli.results import print_compression
from spectrim.model.choosing import choose_targets
from spectrim.model.experts.unfold import unfold
from spectrim.model.experts.watching import find_experts
from spectrim.model.outside import Outside, count_outside
from spectrim.model.tracing import trace
from spectrim.report.content import read_result
from spectrim.report.page import render_page

VECTORS = "norms, biases and other vectors"
ELSEWHERE = f"{VECTORS} outside the blocks"
BLOCKS = {"gpt2": "transformer.h.", "lfm2": "model.layers."}


def tensors(model):
    """Name -> (dimensions, numbers) as in a checkpoint; a tied tensor has its first name only."""
    found, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = (tensor.ndim, tensor.numel())
    return found


def totals(model, name):
    sizes = tensors(model)
    inside = {k: v for k, v in sizes.items() if k.startswith(BLOCKS.get(name, "model.layers."))}
    outside = {k: v for k, v in sizes.items() if k not in inside}
    return inside, outside


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_of_a_dense_model_only_the_norms_of_the_blocks_stay_outside(name):
    model, _ = tiny(name)
    inside, outside = totals(model, name)
    counted = count_outside(model, trace(model, windows(1)))
    assert counted.blocks == sum(n for _, n in inside.values())
    assert counted.model == counted.blocks + sum(n for _, n in outside.values())
    norms = sum(n for k, (_, n) in inside.items() if "norm" in k or ".ln_" in k)
    assert counted.in_blocks == {VECTORS: norms}
    assert norms / counted.blocks < 0.02
    tied = name != "llama"
    embeddings = "embeddings, shared with the head" if tied else "embeddings"
    expected = Counter()
    for key, (ndim, count) in outside.items():
        kind = ELSEWHERE if ndim == 1 else "the head" if key == "lm_head.weight" else "embeddings"
        shared = tied and key in ("model.embed_tokens.weight", "transformer.wte.weight")
        expected[embeddings if shared else kind] += count
    assert counted.elsewhere == expected


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_shapes_are_enough(name):
    model, _ = tiny(name)
    anatomy = trace(model, windows(1))
    counted = count_outside(model, anatomy)
    model.to("meta").tie_weights()
    assert count_outside(model, anatomy) == counted


def test_experts_are_most_of_a_mixture_and_are_named_first():
    model, _ = tiny("mixtral")
    inside, _ = totals(model, "mixtral")
    counted = count_outside(model, trace(model, windows(1)))
    experts = sum(n for k, (_, n) in inside.items() if ".experts." in k)
    router = sum(n for k, (_, n) in inside.items() if k.endswith("mlp.gate.weight"))
    norms = sum(n for _, (ndim, n) in inside.items() if ndim == 1)
    assert sum(counted.in_blocks.values()) == experts + router + norms
    reason = next(iter(counted.record()["in_blocks"]))
    assert counted.in_blocks[reason] == experts and "3-D parameter" in reason
    assert counted.in_blocks["router"] == router
    assert f"({100 * experts / counted.blocks:.1f} % {reason}; " in counted.words


def test_filters_of_a_convolution_are_counted():
    model = family("lfm2", layer_types=["conv", "full_attention"])
    inside, _ = totals(model, "lfm2")
    counted = count_outside(model, trace(model, windows(1)))
    filters = [n for _, (ndim, n) in inside.items() if ndim == 3]
    assert filters and counted.in_blocks["3-D parameter of Conv1d, not a linear layer"] == sum(
        filters
    )


def test_protected_layers_are_counted_with_their_biases():
    model, _ = tiny("gpt2")
    anatomy = choose_targets(trace(model, windows(1)), [], ["*.c_proj", "*.0.attn.c_attn"])
    inside, _ = totals(model, "gpt2")
    protected = sum(n for k, (_, n) in inside.items() if ".c_proj." in k or ".0.attn.c_attn." in k)
    counted = count_outside(model, anatomy)
    assert counted.in_blocks["protected"] == protected
    inside_budget = sum(
        t.out_features * t.in_features + t.bias * t.out_features for t in anatomy.targets
    )
    assert sum(counted.in_blocks.values()) + inside_budget == counted.blocks


def test_the_sentence_names_the_largest_first_and_sums_up_the_rest():
    counted = Outside(
        1000,
        100_000,
        {"router": 43, "protected": 81},
        {"a": 30_000, "b": 20_000, "c": 10_000, "d": 5000, "e": 10, "f": 9},
    )
    assert counted.words == (
        "12.4 % of the block parameters (8.1 % protected; 4.3 % router) and 65.1 % of the whole "
        "model (30.0 % a; 20.0 % b; 10.0 % c; 5.0 % d; 0.1 % for 3 other reasons)"
    )
    assert Outside(10**6, 10**6 + 1, {"x": 999_999}, {"y": 1}).words == (
        ">99.9 % of the block parameters (>99.9 % x) and >99.9 % of the whole model "
        "(>99.9 % in the blocks; <0.1 % y)"
    )
    assert Outside(10, 10, {}, {}).words == (
        "0 % of the block parameters and 0 % of the whole model"
    )


@pytest.mark.parametrize("out_of_core", [False, True])
def test_report_summary_card_and_page_say_it(tmp_path, capsys, out_of_core):
    model, _ = tiny("mixtral")
    model.save_pretrained(tmp_path / "m")
    unfold(model, find_experts(model, windows(1))[0])  # experts are within the budget
    expected = count_outside(model, trace(model, windows(1)))
    folder = tmp_path / "out"
    result = api.compress(
        tmp_path / "m", recipe="svd", keep=0.5, output=folder, out_of_core=out_of_core
    )
    assert result.report["outside_budget"] == expected.record()
    print_compression({**result.report, "output": folder})
    shown = " ".join(capsys.readouterr().out.split())
    assert "outside the budget" in shown and expected.words[:40] in shown
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"Outside the budget: {expected.words}." in card
    content = read_result(folder)
    assert f"Outside the budget: {expected.words}." in render_page(content)

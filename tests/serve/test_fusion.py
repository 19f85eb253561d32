import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import spectrim.storage.quantizer  # noqa: F401  (teaches transformers to load the folders)
from architectures import BLOCKS, tiny, windows
from spectrim.errors import ModelError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.swap import compressed_layers, dense_shape, is_dense_linear, swap_in
from spectrim.serve.fusion import FusedSlice, fuse, shared_inputs
from spectrim.storage.attach import attach

KINDS = {"factored": LowRankLinear, "packed": PackedLinear}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compressed(architecture, kind, *, rank=7, only=None):
    """A tiny model in fp64 whose block linears are low-rank, with tokens to run it on."""
    model, _ = tiny(architecture)
    model.double()
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if not is_dense_linear(module) or "head" in name or (only and not name.endswith(only)):
            continue
        m, n = dense_shape(module, name)
        up, down = draw(m, rank, seed=seed) / n**0.5, draw(rank, n, seed=seed + 1000) / rank**0.5
        bias = module.bias
        swap_in(
            model,
            name,
            KINDS[kind].from_factors(up, down, bias, dtype=torch.float64, device="cpu"),
        )
    return model, windows(2, 6)


def last(names):
    return tuple(name.rpartition(".")[2] for name in names)


EXPECTED = {
    ("llama", "factored"): [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    ("llama", "packed"): [("q_proj", "k_proj", "v_proj")],
    ("gpt2", "factored"): [],
    ("opt", "packed"): [("q_proj", "k_proj", "v_proj")],
}


@pytest.mark.parametrize(("architecture", "kind"), EXPECTED)
def test_fusion_changes_no_logit(architecture, kind):
    model, tokens = compressed(architecture, kind)
    with torch.no_grad():
        expected = model(tokens).logits
        generated = model.generate(tokens[:, :3], max_new_tokens=4, do_sample=False)
        fusion = fuse(model)
        assert [set(last(g)) for g in fusion.groups] == [
            set(g) for g in EXPECTED[architecture, kind] * BLOCKS
        ]
        assert torch.allclose(model(tokens).logits, expected, rtol=1e-10, atol=1e-10)
        again = model.generate(tokens[:, :3], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, again)


def test_gradients_are_those_of_the_separate_layers():
    model, tokens = compressed("llama", "factored")
    separate = copy.deepcopy(model)
    separate(tokens, labels=tokens).loss.backward()
    fuse(model)
    model(tokens, labels=tokens).loss.backward()
    for name, layer in model.named_modules():
        if isinstance(layer, FusedSlice):
            found = layer.shared.weight.grad[layer.start : layer.stop]
            expected = separate.get_submodule(name).weight.grad
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    embedding = model.get_input_embeddings().weight.grad
    assert torch.allclose(embedding, separate.get_input_embeddings().weight.grad, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_has_the_same_state(kind):
    model, _ = compressed("llama", kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    numbers = sum(p.numel() for p in model.parameters())
    assert fuse(model).groups
    found = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert found.keys() == before.keys()
    assert all(torch.equal(found[k], v) for k, v in before.items())


def test_fused_model_saves_and_loads_like_the_unfused_one():
    model, tokens = compressed("llama", "factored")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.01)
    fuse(model)
    model.load_state_dict(other.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, other(tokens).logits, atol=1e-10)
    wrong = other.state_dict()
    key = next(k for k in wrong if k.endswith("q_proj.down.weight"))
    with pytest.raises(RuntimeError, match="shape"):
        model.load_state_dict(wrong | {key: torch.zeros(1, 1)})
    del wrong[key]
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_of_a_fused_model_loads_as_the_separate_one(kind, tmp_path):
    model, tokens = compressed("llama", kind)
    model.float()
    attach(model)
    separate = {k: v.clone() for k, v in model.state_dict().items()}
    assert fuse(model).groups
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(m) for m in compressed_layers(loaded).values()} == {KINDS[kind]}
    assert all(torch.equal(v, separate[k]) for k, v in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


class Trio(nn.Module):
    def __init__(self):
        super().__init__()
        for i, name in enumerate("abc"):
            up, down = draw(8, 3, seed=i), draw(3, 9, seed=10 + i)
            kind = LowRankLinear if name == "b" else PackedLinear
            layer = kind.from_factors(up, down, None, dtype=torch.float64, device="cpu")
            setattr(self, name, layer)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x)


@pytest.fixture
def trio():
    """A separate and a fused copy: factored and packed layers share one stack."""
    separate = Trio()
    fused = copy.deepcopy(separate)
    assert fuse(fused, [("a", "b", "c")]).groups == (("a", "b", "c"),)
    return separate, fused


def same(found, expected):
    return torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_the_stack_is_multiplied_once_per_input(trio, monkeypatch):
    _, fused = trio
    rows = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b=None: rows.append(w.shape[0]) or linear(x, w, b)
    )
    fused(draw(4, 9))
    fused(draw(4, 9))
    assert rows.count(9) == 2
    assert fused.a.basis.shared._once._held is None


def test_any_order_of_calls_is_correct(trio):
    separate, fused = trio
    x, y = draw(4, 9), draw(4, 9, seed=1)
    for calls in ("cab", "aab", "bcabc", "a", "ca"):
        for v in (x, y, x.clone()):
            for name in calls:
                assert same(getattr(fused, name)(v), getattr(separate, name)(v))


def test_changed_inputs_weights_and_modes_are_noticed(trio):
    separate, fused = trio
    x = draw(4, 9)
    fused.a(x)
    x.mul_(2)
    assert same(fused.b(x), separate.b(x))
    with torch.no_grad():
        for model in trio:
            model.c.basis.weight.mul_(3)
    assert same(fused.c(x), separate.c(x))
    with torch.no_grad():
        fused.a(x)
    assert fused.b(x).requires_grad
    fused.float()
    x = x.float()
    fused.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.b(x).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiles_to_one_graph(trio, mode):
    separate, fused = trio
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with mode():
        for seed in range(2):
            x = draw(4, 9, seed=seed)
            assert all(same(f, s) for f, s in zip(compiled(x), separate(x), strict=True))
    assert fused.a.basis.shared._once._held is None


def test_moving_and_copying_keep_the_stack_shared(trio):
    _, fused = trio
    fused.a(draw(4, 9))
    moved = copy.deepcopy(fused).to(torch.float32)
    assert moved.a.basis.shared is moved.b.down.shared is moved.c.basis.shared
    assert moved.a.basis.shared is not fused.a.basis.shared
    assert moved.a.basis.shared._once._held is None
    assert moved.a.basis.weight.dtype == torch.float32
    assert len([n for n, _ in moved.named_parameters() if "shared" in n]) == 1


def test_groups_are_found_by_tracing_and_dense_layers_are_left():
    model, _ = compressed("llama", "factored", only=("q_proj", "v_proj", "up_proj"))
    model.train()
    groups = shared_inputs(model)
    assert [last(g) for g in groups] == [("q_proj", "v_proj")] * BLOCKS
    assert model.training and model.model.layers[0].self_attn.q_proj.training


def test_what_cannot_be_joined_is_left_and_named():
    inside = LowRankLinear.from_factors
    model = nn.ModuleDict(
        {
            "in": PackedLinear.from_factors(
                draw(9, 3), draw(3, 8), None, dtype=torch.float64, device="cpu"
            ),
            "single": inside(draw(7, 3), draw(3, 8), None, dtype=torch.float32, device="cpu"),
            "x": inside(draw(7, 3), draw(3, 8), None, dtype=torch.float64, device="cpu"),
            "y": inside(draw(7, 2), draw(2, 8), None, dtype=torch.float64, device="cpu"),
            "dense": nn.Linear(8, 7),
        }
    )
    fusion = fuse(model, [("in", "single", "x", "y")])
    assert fusion.groups == (("x", "y"),)
    assert set(fusion.left) == {"in", "single"}
    assert fuse(model, [("x", "y")]).left == {"x": "already fused", "y": "already fused"}
    for name in ("dense", "absent"):
        with pytest.raises(ModelError, match=name):
            fuse(model, [("x", name)])

"""The plugin's arithmetic against the layers of spectrim and against dense products."""

import pytest
import torch

from spectrim.errors import ArtifactError, ModelError
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.layout import layout_of
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import quantize_layer
from spectrim.layers.residual import ResidualLinear
from spectrim.storage.table import parse_table
from spectrim_vllm import assembly as assembling
from spectrim_vllm import naming
from spectrim_vllm.assembly import Assembly, packed_factors, stored_tensors
from spectrim_vllm.naming import below, is_compressed, member_names, pieces_of
from spectrim_vllm.stacking import Piece, Place, Stack

N = 24
KINDS = {"factored": LowRankLinear, "packed": PackedLinear}


def layer(storage, m, n=N, k=5, seed=0):
    """A layer of ours in fp64, and its tensors as they are on disk."""
    generator = torch.Generator().manual_seed(seed + m)
    up = torch.randn(m, k, generator=generator, dtype=torch.float64)
    down = torch.randn(k, n, generator=generator, dtype=torch.float64)
    if storage == "dense":
        return up @ down, {"weight": up @ down}
    made = KINDS[storage].from_factors(up, down, None, dtype=torch.float64, device="cpu")
    renames = {"up.weight": "weight", "basis.weight": "weight"}
    return made.dense_weight(), {renames.get(k, k): t for k, t in made.state_dict().items()}


def assembled(storage, m, n=N, k=5, seed=0):
    """Dense weight, down, up of one piece that came tensor by tensor."""
    W, tensors = layer(storage, m, n, k, seed)
    assembly = Assembly(Piece("p", None if storage == "dense" else k, storage, (m,)))
    assert set(tensors) == set(stored_tensors(assembly.piece))
    factors = None
    for name, tensor in reversed(tensors.items()):
        assert factors is None and assembly.missing()
        factors = assembly.add(name, tensor)
    assert not assembly.missing()
    return W, *factors


@pytest.mark.parametrize("m", [8, 24, 40])
def test_packed_layers_become_factors_without_rounding(m):
    made = PackedLinear.from_factors(
        torch.randn(m, 5), torch.randn(5, N), None, dtype=torch.bfloat16, device="cpu"
    )
    up, down = packed_factors(made.basis.weight, made.coefficients.weight, made.order)
    assert up.dtype == down.dtype == torch.bfloat16
    exact = made.packed().to(torch.float64).product()
    assert torch.allclose(up.double() @ down.double(), exact, rtol=1e-12, atol=1e-12)


def stack_of(kinds, sizes, place, *, n=N):
    share = place.ranks if place.splits == "out" else 1
    pieces = [
        Piece(f"p{i}", None if kind == "dense" else 3 + i, kind, (m // share,))
        for i, (kind, m) in enumerate(zip(kinds, sizes, strict=True))
    ]
    return Stack(tuple(pieces), n // (1 if place.splits == "out" else place.ranks), place)


def loaded(kinds, sizes, place, *, n=N):
    """A stack with its tensors, and the dense weights of its pieces."""
    stack = stack_of(kinds, sizes, place, n=n)
    first = torch.full((stack.rows, stack.in_features), torch.nan, dtype=torch.float64)
    ups = torch.full((stack.up_numbers,), torch.nan, dtype=torch.float64)
    weights = []
    for i, (kind, m) in enumerate(zip(kinds, sizes, strict=True)):
        W, down, up = assembled(kind, m, n, 3 + i, seed=i)
        stack.write(i, first, ups, down, up)
        weights.append(W)
    assert not first.isnan().any() and not ups.isnan().any()
    return stack, first, ups, weights


FUSED = [
    ("factored", "factored", "factored"),
    ("packed", "factored", "dense"),
    ("dense", "packed", "packed"),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kinds", FUSED)
def test_column_parallel_ranks_side_by_side_are_the_dense_product(kinds, ranks):
    sizes = (32, 8, 16)
    x = torch.randn(3, N, dtype=torch.float64)
    parts = []
    for rank in range(ranks):
        stack, first, ups, weights = loaded(kinds, sizes, Place(rank, ranks, "out"))
        y = stack.forward(x, first, stack.ups_of(ups), None)
        parts.append(y.split([m // ranks for m in sizes], dim=-1))
    for i, W in enumerate(weights):
        y = torch.cat([part[i] for part in parts], dim=-1)
        assert torch.allclose(y, x @ W.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["factored", "packed", "dense"])
@pytest.mark.parametrize("m", [16, 40])
def test_row_parallel_ranks_add_up_to_the_dense_product(kind, m, ranks):
    x = torch.randn(3, N, dtype=torch.float64)
    total = 0
    for rank in range(ranks):
        stack, first, ups, (W,) = loaded((kind,), (m,), Place(rank, ranks, "in"))
        total = total + stack.forward(x.chunk(ranks, dim=-1)[rank], first, stack.ups_of(ups), None)
    assert torch.allclose(total, x @ W.T, rtol=1e-10, atol=1e-10)


def test_a_layer_is_one_product_and_one_per_compressed_piece():
    stack, first, ups, _ = loaded(("factored", "dense", "packed"), (32, 8, 16), Place(0, 1, "out"))
    shapes = []

    def multiply(x, w):
        shapes.append(tuple(w.shape))
        return x @ w.T

    x = torch.randn(2, N, dtype=torch.float64)
    stack.forward(x, first, stack.ups_of(ups), torch.zeros(56), multiply)
    assert shapes == [(3 + 8 + 5, N), (32, 3), (16, 5)]


@pytest.mark.parametrize(("rank", "start"), [(0, 0), (1, 0), (2, 4), (3, 4)])
def test_repeated_heads_lie_on_neighbouring_ranks(rank, start):
    piece = Piece("k", 2, "factored", (4,))
    assert piece.own_rows(8, Place(rank, 4, "out")) == [(start, 4)]


def test_a_piece_that_is_fused_in_the_checkpoint_is_dealt_out_part_by_part():
    piece = Piece("qkv", 2, "factored", (4, 2, 2))
    assert piece.own_rows(16, Place(1, 2, "out")) == [(4, 4), (10, 2), (14, 2)]
    assert piece.own_rows(8, Place(0, 1, "out")) == [(0, 4), (4, 2), (6, 2)]
    with pytest.raises(ModelError, match="cannot be dealt"):
        piece.own_rows(20, Place(0, 2, "out"))
    with pytest.raises(ModelError, match="cannot be dealt"):
        Piece("k", 2, "factored", (4,)).own_rows(9, Place(0, 2, "out"))


def test_tensors_that_do_not_fit_are_refused():
    _, tensors = layer("packed", 16)
    assembly = Assembly(Piece("p", 5, "packed", (16,)))
    assembly.add("weight", tensors["weight"])
    assembly.add("order", torch.zeros(16, dtype=torch.int32))
    with pytest.raises(ArtifactError, match="not a permutation"):
        assembly.add("coefficients.weight", tensors["coefficients.weight"])
    assembly = Assembly(Piece("p", 4, "factored", (16,)))
    with pytest.raises(ArtifactError, match="no tensor 'up'"):
        assembly.add("up", torch.ones(2))
    assembly.add("weight", torch.ones(16, 5))
    with pytest.raises(ArtifactError, match="do not fit factored storage of rank 4"):
        assembly.add("down.weight", torch.ones(5, N))
    stack, first, ups, _ = loaded(("factored",), (16,), Place(0, 2, "in"))
    with pytest.raises(ModelError, match=f"reads {N + 2} features"):
        stack.write(0, first, ups, torch.ones(3, N + 2), torch.ones(16, 3))


def table(**layers):
    entries = {
        name.replace("__", "."): {"rank": 4, "storage": "factored"} | entry
        for name, entry in layers.items()
    }
    return parse_table({"layers": entries}, source="test")


def test_names_of_vllm_lead_to_names_of_the_file():
    made = table(layers__0__self_attn__k_proj={}, layers__0__mlp__down_proj={"storage": "packed"})
    prefix = "model.layers.0.self_attn.qkv_proj"
    assert is_compressed(made, prefix, {})
    pieces = pieces_of(made, prefix, [8, 4, 4], {})
    assert [(p.storage, p.rank) for p in pieces] == [
        ("dense", None),
        ("factored", 4),
        ("dense", None),
    ]
    assert not is_compressed(made, "model.layers.0.mlp.gate_up_proj", {})
    assert not is_compressed(made, "model.layers.10.self_attn.qkv_proj", {})
    assert is_compressed(made, "language_model.model.layers.0.mlp.down_proj", {})
    assert member_names("a.in_proj", {"in_proj": ["x", "y"]}) == ["a.x", "a.y"]
    assert below(made, "model.layers.0.mlp") == ["layers.0.mlp.down_proj"]
    whole = table(layers__0__self_attn__qkv_proj={})
    assert pieces_of(whole, prefix, [8, 4, 4], {})[0].outputs == (8, 4, 4)


def test_an_unknown_fusion_is_refused():
    made = table(layers__0__self_attn__k_proj={})
    with pytest.raises(ModelError, match="fusion is not known"):
        pieces_of(made, "model.layers.0.self_attn.qkv_proj", [8, 4], {})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("splits", ["out", "in"])
def test_a_rounded_matrix_and_its_correction_are_served_as_their_sum(splits, rank):
    """Sharded as a dense matrix is, whatever rank the correction has."""
    m, weights = 40, "int3-g32+int8"
    made = ResidualLinear(N, m, 4, bias=False)
    quantize_layer(made, weights, dtype=torch.float32)
    said = {"storage": "residual", "weights": weights, "shape": [m, N], "rank": 4}
    place = Place(rank, 2, splits)
    own = m // 2 if splits == "out" else m
    stack = Stack(pieces_of(table(x=said), "x", [own], {}), N // 2 if splits == "in" else N, place)
    assembly, factors = Assembly(stack.pieces[0]), None
    for key, tensor in made.state_dict().items():
        factors = assembly.add(layout_of("residual", weights).disk_key(key), tensor)
    assert factors is not None and factors[1] is None and stack.up_numbers == 0
    first = torch.empty(stack.rows, stack.in_features)
    stack.write(0, first, torch.empty(0), *factors)
    W = made.dense_weight()
    half = slice(rank * W.shape[splits == "in"] // 2, (rank + 1) * W.shape[splits == "in"] // 2)
    torch.testing.assert_close(first, W[half] if splits == "out" else W[:, half])


def test_what_a_newer_spectrim_stores_is_refused_by_name(monkeypatch):
    said = {"storage": "factored", "weights": "int8", "shape": [8, N], "rank": 4}
    monkeypatch.delitem(assembling._DTYPES, "int8")
    with pytest.raises(ModelError, match=r"x has weights int8, whose int8 numbers.*--upgrade"):
        pieces_of(table(x=said), "x", [8], {})
    monkeypatch.setattr(naming, "_HELD", ("dense",))
    with pytest.raises(ModelError, match=r"x is stored factored.*--upgrade"):
        pieces_of(table(x=said), "x", [8], {})


@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g32+int8", "int8+native"])
@pytest.mark.parametrize("storage", ["factored", "packed", "dense"])
def test_integers_are_restored_to_what_the_layer_computes(storage, weights):
    if storage == "dense" and "+" in weights:
        pytest.skip("one part, one format")
    m, k = 40, None if storage == "dense" else 5
    W = torch.randn(m, N, generator=torch.Generator().manual_seed(0))
    if storage == "dense":
        made = QuantizedDense(torch.nn.Linear(N, m, bias=False))
        made.inner.weight.data = W
    else:
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        made = KINDS[storage].from_factors(
            U[:, :k] * s[:k], Vh[:k], None, dtype=torch.float32, device="cpu"
        )
    quantize_layer(made, weights, dtype=torch.bfloat16)
    layout = layout_of(storage, weights)
    piece = pieces_of(
        table(x={"storage": storage, "weights": weights, "shape": [m, N], "rank": k}), "x", [m], {}
    )[0]
    assembly, factors = Assembly(piece), None
    for key, tensor in made.state_dict().items():
        factors = assembly.add(layout.disk_key(key), tensor)
        kind = stored_tensors(piece)[layout.disk_key(key)]
        assert tensor.dtype == (kind or torch.bfloat16)
    assert factors is not None and not assembly.missing()
    down, up = factors
    found = down if up is None else up.double() @ down.double()
    expected = made.dense_weight().double()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    assembly = Assembly(piece)
    with pytest.raises(ArtifactError, match="do not fit"):
        for key, tensor in made.state_dict().items():
            assembly.add(layout.disk_key(key), tensor[:-1])

"""Compressed tiny models for the storage tests."""

import torch

from architectures import tiny
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.swap import swap_in
from spectrim.model.weights import is_linear, read_bias, read_weight
from spectrim.storage.attach import attach
from spectrim.storage.card import Card
from spectrim.storage.folder import Papers, save_model
from spectrim.storage.table import Provenance

OUTSIDE = ("lm_head", "embed_out", "gate")


def linear_names(model):
    """Linear layers inside the blocks, routers excluded."""
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and name.rpartition(".")[2] not in OUTSIDE
    ]


def compressed(name="llama", *, rank=5, kinds=("factored", "packed"), model=None, extra=()):
    """A tiny model in which four of five targets are compressed, kinds in turn, and attached."""
    model = tiny(name)[0] if model is None else model
    names = [*linear_names(model), *extra]
    left = [n for i, n in enumerate(names) if i % 5 == 0 and n not in extra]
    classes = {"factored": LowRankLinear, "packed": PackedLinear}
    for i, target in enumerate(n for n in names if n not in left):
        old = model.get_submodule(target)
        U, s, Vh = torch.linalg.svd(read_weight(old).double(), full_matrices=False)
        layer = classes[kinds[i % len(kinds)]].from_factors(
            U[:, :rank] * s[:rank],
            Vh[:rank],
            read_bias(old),
            dtype=old.weight.dtype,
            device="cpu",
        )
        swap_in(model, target, layer)
    attach(model, left_dense=left, provenance=Provenance(recipe="test", keep=0.5))
    return model


def save(model, output, tokenizer=None, **options):
    numbers = {"perplexity": ("10.0", "11.0")}
    card = Card("Tiny", "someone/tiny", "test", "name: test\n", numbers)
    return save_model(
        model,
        tokenizer,
        output,
        Papers("name: test\n", {"quality": 1.5}, card.text()),
        **options,
    )

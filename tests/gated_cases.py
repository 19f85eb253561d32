"""Tiny gated models for the tests of training."""

import torch

from architectures import tiny, windows
from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.allocate.ladder import Limits
from spectrim.learn.gated import GatedLinear, Lora
from spectrim.learn.lessons import Lessons, seeded
from spectrim.learn.pruning import Gated
from spectrim.model.tail import Tail, blocks_in_sequence
from spectrim.model.weights import read_bias, read_weight, replace_module
from storage_cases import linear_names


def gated_model(name="llama", *, rank=0, deviation=False, dtype=torch.float32, dropout=0.0):
    """`(model, gated)`: a tiny model whose targets are gated in the basis of a plain SVD."""
    model, _ = tiny(name)
    model.to(dtype).requires_grad_(False)
    layers, curves = {}, []
    for i, target in enumerate(linear_names(model)):
        original = model.get_submodule(target)
        W, bias = read_weight(original), read_bias(original)
        U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        lora = None
        if rank:
            lora = Lora(*W.shape, rank, scale=0.5, dropout=dropout)
            lora.initialize(seeded(0, i))
        layers[target] = GatedLinear(
            original,
            U.to(dtype),
            (s[:, None] * Vh).to(dtype),
            bias,
            lora=lora,
            deviation=deviation and bias is not None,
        )
        curves.append(Curve(target, 0, target, Shape(*W.shape, bias is not None)))
        replace_module(model, target, layers[target])
    return model, Gated(layers, curves, Limits(dtype_bytes=4), adapters=rank)


def lessons_of(model, *, n=8, batch=4, seed=0, teacher=None, accumulate=1):
    ids = windows(n)
    names = blocks_in_sequence(model, ids[:1])
    tail, states = Tail.find(model, names, ids), None
    if teacher is not None:
        with torch.no_grad():
            states = Tail.find(teacher, names, ids).states(ids)
    return Lessons(
        ids=ids,
        student=tail.states,
        teacher=None if states is None else lambda rows: states[rows],
        tail=tail,
        device=torch.device("cpu"),
        batch=batch,
        accumulate=accumulate,
        seed=seed,
    )

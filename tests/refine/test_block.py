"""Training a block against outputs: exact bookkeeping on a block small enough to check by hand."""

import copy

import pytest
import torch
from torch import nn

from spectrim.decompose import decompose
from spectrim.distributed.pool import Pool
from spectrim.distributed.team import Team
from spectrim.errors import InputError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.stream import Stream
from spectrim.moments.moments import Moments
from spectrim.refine.block import BlockTraining, refine_block
from spectrim.refine.course import hold_out

CPU = torch.device("cpu")


class Block(nn.Module):
    """Residual, normalised, one hidden layer."""

    def __init__(self, width=10, inner=14):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(self.norm(x))))


def streams(windows=40, tokens=9, width=10, dtype=torch.float32):
    """Inputs, and the outputs of a random block on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(width).to(dtype)
        mixing = torch.randn(width, width) * 0.7 ** torch.arange(width)
        x = (torch.randn(windows, tokens, width) @ mixing.T).to(dtype)
    with torch.no_grad():
        return block, Stream(x), Stream(block(x))


def cut(block, rank=4):
    """The block with its first layer truncated plainly."""
    smaller = copy.deepcopy(block)
    weight = block.first.weight.detach().double()
    up, down = decompose("plain", weight, Moments(1, None), name="first").cut(rank)
    smaller.first = LowRankLinear.from_factors(
        up, down, block.first.bias, dtype=block.first.weight.dtype, device=CPU
    )
    return smaller


def error(block, inputs, targets, rows):
    with torch.no_grad():
        return float((block(inputs.read(rows)) - targets.read(rows)).square().mean())


def refine(block, inputs, targets, **training):
    settings = {"epochs": 8, "batch": 8, "learning_rate": 5e-3, **training}
    pool = Pool(Team(), inputs.shape[0], (inputs, targets))
    return refine_block("the block", block, block, pool, BlockTraining(**settings), device=CPU)


def test_losses_are_held_out_errors_and_fall():
    original, inputs, targets = streams()
    block = cut(original)
    _, held = hold_out(40, BlockTraining().held_out)
    before = error(block, inputs, targets, held)
    result = refine(block, inputs, targets)
    assert result.before == pytest.approx(before, rel=1e-6)
    assert result.after == pytest.approx(error(block, inputs, targets, held), rel=1e-6)
    assert result.after < 0.8 * before


def test_factors_norms_and_biases_all_learn():
    original, inputs, targets = streams()
    block = cut(original)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    refine(block, inputs, targets)
    for name, p in block.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_a_perfect_block_is_left_alone():
    original, inputs, targets = streams()
    block = copy.deepcopy(original)
    result = refine(block, inputs, targets)
    assert result.step == 0 and result.after == result.before
    assert result.before < 1e-12  # rounding: the judge's batches are not the streams'
    assert torch.equal(block.first.weight, original.first.weight)


def test_bf16_blocks_are_judged_as_they_are_stored():
    original, inputs, targets = streams(dtype=torch.bfloat16)
    block = cut(original)
    result = refine(block, inputs, targets)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert result.after < result.before
    _, held = hold_out(40, BlockTraining().held_out)
    with torch.no_grad():
        wide = copy.deepcopy(block).float()
        found = wide(inputs.read(held).float()) - targets.read(held).float()
    assert result.after == pytest.approx(float(found.square().mean()), rel=1e-5)


def test_steps_follow_epochs_and_batches():
    settings = BlockTraining(epochs=25, batch=32).settings(224)
    assert (settings.steps, settings.judge_every) == (175, 7)
    assert BlockTraining(epochs=3, batch=32).settings(33).steps == 6


def test_same_seed_same_bytes():
    original, inputs, targets = streams()
    blocks = [cut(original) for _ in range(3)]
    for block, seed in zip(blocks, (0, 0, 1), strict=True):
        refine(block, inputs, targets, epochs=2, seed=seed)
    one, other, third = (block.first.up.weight for block in blocks)
    assert torch.equal(one, other) and not torch.equal(one, third)


def test_one_window_cannot_be_split():
    original, inputs, targets = streams(windows=1)
    with pytest.raises(InputError, match="1 calibration window"):
        refine(cut(original), inputs, targets)

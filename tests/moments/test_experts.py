"""Moments of experts: sums over their own tokens, and towards all experts' where those are few."""

import pytest
import torch
from torch import nn

from architectures import mixture, windows
from spectrim.model.anatomy import Expert, Group, Target
from spectrim.model.experts.unfold import unfold
from spectrim.model.experts.watching import find_experts
from spectrim.model.replay import record
from spectrim.model.tracing import trace
from spectrim.moments.accumulate import accumulator_of
from spectrim.moments.experts import WORTH, BlockMoments, pooled_share
from spectrim.moments.gradients import gradient_pass
from spectrim.moments.gradients_by_block import gradients_by_block

WIDTH = 6
CLOSE = 1e-4  # relative: sums of fp32 products in another order


def group(number, *, common, width=WIDTH):
    expert = Expert(number, "experts.up", reads_common=common, writes_common=False)
    name = f"blocks.0.experts.up.{number}"
    target = Target(name, f"experts.up.{number}", 0, number, 4, width, False, expert=expert)
    return Group(0, number, width, (target,))


def moments(counts, *, common):
    """Groups, their tokens, and what is made of them."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in counts]
    groups = [group(i, common=common) for i in range(len(counts))]
    sums = {}
    for one, x in zip(groups, tokens, strict=True):
        sums[one.index] = accumulator_of(one, {"C", "absolute"})
        for part in x.split(3):
            sums[one.index].add(part)
    return groups, tokens, list(BlockMoments(groups, sums).values())


def test_shared_inputs_are_blended_with_the_mean_of_all_tokens():
    _, tokens, found = moments([9, 0, 40], common=True)
    everything = torch.cat(tokens)
    mean = everything.mT @ everything / len(everything)
    for x, one in zip(tokens, found, strict=True):
        n = len(x)
        share = WORTH * WIDTH / (WORTH * WIDTH + n)
        expected = (1 - share) * x.mT @ x + share * n * mean if n else mean
        assert torch.allclose(one.C, expected)
        assert one.pooled == pytest.approx(share)
        assert one.tokens == max(1, n)
    assert found[1].pooled == 1
    assert torch.allclose(found[1].absolute, everything.abs().mean(0))


def test_inputs_of_an_experts_own_keep_their_squares_and_lose_correlations():
    _, tokens, found = moments([9, 0, 40], common=False)
    for x, one in zip(tokens, found, strict=True):
        if len(x):
            C, share = x.mT @ x, pooled_share(len(x), WIDTH)
            assert torch.allclose(one.C.diagonal(), C.diagonal())
            off = ~torch.eye(WIDTH, dtype=torch.bool)
            assert torch.allclose(one.C[off], (1 - share) * C[off])
    # Of an expert without tokens nothing is known but how large such inputs are.
    level = torch.cat(tokens).square().mean()
    assert torch.allclose(found[1].C, level * torch.eye(WIDTH, dtype=torch.float64))


def test_blending_does_not_mind_how_channels_are_scaled():
    scale = torch.logspace(-3, 3, WIDTH, dtype=torch.float64)
    for common in (True, False):
        groups, tokens, found = moments([9, 4, 40], common=common)
        sums = {}
        for one, x in zip(groups, tokens, strict=True):
            sums[one.index] = accumulator_of(one, {"C"})
            sums[one.index].add(x * scale)
        for one, other in zip(found, BlockMoments(groups, sums).values(), strict=True):
            assert torch.allclose(other.C, one.C * scale * scale[:, None])


def test_rows_of_zeros_are_no_tokens_of_an_expert():
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    accumulator = accumulator_of(group(0, common=True), {"C"})
    accumulator.add(torch.cat([x, torch.zeros(7, WIDTH)]))
    assert accumulator.moments().tokens == 5


def opened(kind):
    model = mixture(kind).requires_grad_(False)
    unfold(model, find_experts(model, torch.arange(8)[None])[0])
    return model, trace(model, torch.arange(8)[None])


def brute(model, anatomy, ids):
    """Gradient of the summed loss with respect to every target's weight, by autograd."""
    targets = {t.name: model.get_submodule(t.name).weight for t in anatomy.targets}
    for weight in targets.values():
        weight.requires_grad_(True)
    logits = model(input_ids=ids, use_cache=False).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum").backward()
    found = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in targets.items()}
    for weight in targets.values():
        weight.requires_grad_(False)
    return found


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gradients_of_experts_are_those_of_their_weights_in_both_passes(kind):
    model, anatomy = opened(kind)
    ids = windows(3, 10)
    options = {"needs": {"G", "gradient"}, "input_needs": {"C"}, "batch": 2}
    whole = gradient_pass(model, anatomy, ids, **options)
    replay = record(model, ids, batch=2, anatomy=anatomy)

    def at_hand(block):
        from contextlib import nullcontext

        return nullcontext(model.get_submodule(block.name))

    pieces = dict(
        (block.index, found)
        for block, found in gradients_by_block(replay, anatomy, ids, at_hand=at_hand, **options)
    )
    expected = brute(model, anatomy, ids)
    for target in anatomy.targets:
        one, other = whole.outputs[target.name], pieces[target.block].outputs[target.name]
        scale = max(g.abs().max() for g in expected.values())
        assert (one.gradient - expected[target.name]).abs().max() < CLOSE * scale
        assert (other.gradient - one.gradient).abs().max() < CLOSE * scale
        assert torch.allclose(one.G, other.G, rtol=1e-2, atol=CLOSE * float(one.G.abs().max()))
        # A token that is sent elsewhere counts, with a gradient of zero.
        assert one.tokens == other.tokens == ids.numel()
        assert one.windows == other.windows == 3
    for block in anatomy.blocks:
        steps = [g for g in block.groups if g.expert is not None and len(g.targets) == 2]
        seen = [whole.inputs[g.targets[0].name] for g in steps]
        tokens = sum(one.tokens for one in seen if one.pooled < 1)
        assert tokens == 2 * ids.numel()  # every token goes to two experts

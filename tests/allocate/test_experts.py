"""Equal ranks for the experts of a block: planned as one target, spelt out as many."""

import numpy as np
import pytest

from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.allocate.experts import equal_in_blocks
from spectrim.allocate.rules import allocate
from spectrim.errors import InputError


def curves(experts=3, blocks=2):
    generator = np.random.default_rng(0)
    found = []
    for block in range(blocks):
        energy = np.sort(generator.random(12))[::-1]
        shape = Shape(12, 20, False)
        found.append(Curve(f"{block}.o", block, "o", shape, energy, float(energy.sum())))
        for expert in range(experts):
            energy = (expert + 1) * np.sort(generator.random(8))[::-1]
            name = f"{block}.up.{expert}"
            shape = Shape(8, 20, False)
            found.append(Curve(name, block, "up", shape, energy, float(energy.sum())))
    return found


@pytest.mark.parametrize("rule", ["uniform", "loss_ratio", "knapsack"])
def test_experts_of_a_block_get_one_rank_within_the_budget(rule):
    found = curves()
    plan = equal_in_blocks(found, lambda c: allocate(c, rule, keep=0.6))
    assert [e.name for e in plan.entries] == [c.name for c in found]
    for block in range(2):
        assert len({e.rank for e in plan.entries if e.name.startswith(f"{block}.up")}) == 1
    assert plan.achieved_keep <= 0.6
    own = allocate(found, rule, keep=0.6)
    for entry, other in zip(plan.entries, own.entries, strict=True):
        assert entry.dense_bytes == other.dense_bytes
        if entry.rank == other.rank:
            assert entry.bytes == other.bytes


def test_equal_ranks_are_the_best_equal_ranks():
    """Against all combinations of one rank per block and matrix."""
    found = curves(experts=2, blocks=1)
    plan = equal_in_blocks(found, lambda c: allocate(c, "knapsack", keep=0.7))
    first, *experts = found
    budget = 0.7 * 2 * (12 * 20 + 2 * 8 * 20)

    def loss(curve, rank):
        return 0.0 if rank is None else 1 - curve.energy[:rank].sum() / curve.total

    def size(curve, rank):
        m, n = curve.shape.out_features, curve.shape.in_features
        return 2 * (m * n if rank is None else rank * (m + n))

    best = min(
        loss(first, a) + sum(e.total * loss(e, b) for e in experts) / sum(e.total for e in experts)
        for a in (*range(1, 13), None)
        for b in (*range(1, 9), None)
        if size(first, a) + sum(size(e, b) for e in experts) <= budget
    )
    assert plan.predicted_loss == pytest.approx(best)


def test_experts_of_several_shapes_are_refused():
    odd = [Curve("a", 0, "up", Shape(8, 20, False)), Curve("b", 0, "up", Shape(9, 20, False))]
    with pytest.raises(InputError, match="differ in shape"):
        equal_in_blocks(odd, lambda c: allocate(c, "uniform", keep=0.5))

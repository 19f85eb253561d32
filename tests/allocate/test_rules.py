import pytest
import torch

from spectrim.allocate import RULES, Curve, Limits, Shape, allocate
from spectrim.errors import BudgetError, InputError


def survey():
    generator = torch.Generator().manual_seed(0)
    curves = []
    for b in range(4):
        for projection, m, n in [("q", 32, 32), ("up", 80, 32)]:
            energy = torch.exp(-torch.linspace(0, 5, 32, dtype=torch.float64)) * 1e6
            score = torch.randn(32, generator=generator, dtype=torch.float64)
            curves.append(
                Curve(
                    f"{b}.{projection}",
                    b,
                    projection,
                    Shape(m, n),
                    energy,
                    float(energy.sum()),
                    score=score,
                )
            )
    return curves


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8, 1.0])
def test_every_rule_spends_its_budget(rule, keep):
    plan = allocate(survey(), rule, keep=keep)
    assert plan.rule == rule
    assert keep - 0.03 < plan.achieved_keep <= keep
    assert [e.name for e in plan.entries] == [c.name for c in survey()]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_keeps_more_for_more(rule):
    kept = [allocate(survey(), rule, keep=k).achieved_keep for k in (0.45, 0.5, 0.6, 0.7, 0.9)]
    assert kept == sorted(kept)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_refuses_what_cannot_be(rule):
    with pytest.raises(BudgetError, match="reachable are"):
        allocate(survey(), rule, keep=0.1, limits=Limits(floor=0.3))
    with pytest.raises(BudgetError, match="keep"):
        allocate(survey(), rule, keep=1.2)


def test_unknown_rules_are_refused():
    with pytest.raises(InputError, match=r"'best'.*uniform"):
        allocate(survey(), "best", keep=0.5)

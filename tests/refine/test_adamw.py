"""AdamW with a rate per tensor is PyTorch's with a group per tensor."""

import pytest
import torch
from torch import nn

from launches import Launches
from spectrim.refine.adamw import AdamW


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_step_is_that_of_a_group_per_tensor(decay):
    shapes = [(5, 3), (7,), (2, 2, 2), (1,)]
    ours = [nn.Parameter(drawn(i, *shape)) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = AdamW(ours, weight_decay=decay)
    expected = torch.optim.AdamW([{"params": [p]} for p in theirs], weight_decay=decay)
    for step in range(6):
        rates = [0.1 / (1 + i + step) for i in range(len(shapes))]
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            # One of them is not reached at first, nor later on.
            p.grad = None if i == 1 and step % 2 == 0 else drawn(10 * step + i, *shapes[i])
            q.grad = None if p.grad is None else p.grad.clone()
        for group, rate in zip(expected.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.step(rates)
        expected.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_step_of_many_tensors_asks_no_more_than_one_of_few():
    asked = []
    for count in (3, 50):
        parameters = [nn.Parameter(drawn(i, 4)) for i in range(count)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer = AdamW(parameters, weight_decay=0.1)
        with Launches() as launches:
            optimizer.step([0.1] * count)
        asked.append(len(launches.names))
    assert asked[0] == asked[1] < 12

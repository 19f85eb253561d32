"""Masters do what half precision cannot."""

import pytest
import torch
from torch import nn

from spectrim.refine.masters import frozen, master_weights


def test_masters_accumulate_what_bf16_loses():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
    with master_weights([weight]) as as_stored:
        assert weight.dtype == torch.float32 and weight.requires_grad
        for _ in range(100):
            weight.data += 1e-4
            with as_stored():
                stored = weight.detach().clone()
            torch.testing.assert_close(stored, weight.detach().bfloat16().float(), rtol=0, atol=0)
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad
    assert float(weight[0].detach()) == 1.0078125  # 1.01 in bf16
    direct = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(100):
        direct += 1e-4
    assert float(direct[0]) == 1.0


def test_fp64_is_not_narrowed():
    weight = nn.Parameter(torch.full((2,), 1 / 3, dtype=torch.float64))
    with master_weights([weight]):
        assert weight.dtype == torch.float64
    assert float(weight[0].detach()) == 1 / 3


def test_frozen_parameters_thaw_even_after_an_error():
    one = nn.Parameter(torch.zeros(2))
    other = nn.Parameter(torch.zeros(2), requires_grad=False)

    def failing():
        with frozen([one, other]):
            assert not one.requires_grad
            raise LookupError

    with pytest.raises(LookupError):
        failing()
    assert one.requires_grad and not other.requires_grad

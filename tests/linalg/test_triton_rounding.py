"""The rounding kernel against ordinary operators, on CPU tensors by Triton's interpreter."""

import importlib.util
import os

import pytest
import torch

from spectrim.formats import format_of
from spectrim.linalg import turn
from spectrim.linalg.rounding import Grid, Metric

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; it is a large optional package",
)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("weights", ["int4", "int3-g32", "fp8", "stacked"])
def test_the_kernel_gives_the_codes_of_ordinary_operators(weights, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(40, 150, dtype=torch.float64, generator=draw)
    X = torch.randn(150, 300, dtype=torch.float64, generator=draw)
    metric = Metric.of(X @ X.mT, name="x")
    names = ["int8", "int4-g64", "int2-g32"] if weights == "stacked" else [weights]
    rows = [format_of(name) for name in names]
    grids = [row.grid(row.scales(W, metric.importance), 150) for row in rows]
    grid = Grid.stacked(grids) if len(grids) > 1 else grids[0]
    W = W.repeat(len(rows), 1)
    expected = metric.codes(W, grid)
    monkeypatch.setattr(turn, "runs_triton", lambda device: True)
    found = metric.codes(W, grid)
    # Sums in another order may decide a tie otherwise, and everything after it.
    assert (found != expected).double().mean() < 0.01
    losses = [metric.loss(grid.values(c).double() - W).sum() for c in (found, expected)]
    assert abs(losses[0] / losses[1] - 1) < 1e-3

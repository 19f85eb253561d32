"""Random layers with every statistic, the objectives as dense algebra, and a foreign search."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from priors import alike, mixed
from spectrim.decompose import decompose
from spectrim.decompose.decomposition import Decomposition
from spectrim.moments.moments import Moments, OutputMoments


@dataclass(frozen=True)
class Layer:
    """A weight with data: X original, X_shifted shifted inputs as columns, one per token."""

    W: torch.Tensor
    X: torch.Tensor
    X_shifted: torch.Tensor
    gradients: torch.Tensor

    @property
    def moments(self):
        X, Y = self.X, self.X_shifted
        return Moments(X.shape[1], X @ X.T, Y @ Y.T, X @ Y.T, X.abs().sum(1))

    @property
    def output(self):
        g = self.gradients
        per_window = [a @ b.T for a, b in zip(g.split(5, 1), self.X.split(5, 1), strict=True)]
        squares = sum(m.square() for m in per_window)
        return OutputMoments(
            g.shape[1], len(per_window), g @ g.T, squares.sum(0), squares.sum(1), sum(per_window)
        )

    def decompose(self, objective, **options):
        return decompose(objective, self.W, self.moments, self.output, name="layer", **options)


@dataclass(frozen=True)
class Problem:
    """min ‖left (target − W' source)‖², every objective in one dense form."""

    left: torch.Tensor
    target: torch.Tensor
    source: torch.Tensor

    def value(self, W):
        return float((self.left @ (self.target - W @ self.source)).square().sum())

    def alternating(self, k, generator, restarts=3, sweeps=60):
        """Alternating least squares from random starts; converges to the rank-k optimum."""
        inverse = torch.linalg.pinv(self.source)
        reached = (self.left @ self.target) @ inverse @ self.source
        Q = torch.randn(restarts, k, reached.shape[1], generator=generator, dtype=torch.float64)
        P = reached @ Q.mT
        for _ in range(sweeps):
            P = torch.linalg.solve(Q @ Q.mT, Q @ reached.mT).mT
            Q = torch.linalg.solve(P.mT @ P, P.mT @ reached)
        return torch.linalg.pinv(self.left) @ P @ Q @ inverse


def root(C):
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp(min=0).sqrt()


def dense_problem(objective, layer, options):
    """What each objective minimises, written from the data and not from the moments."""
    W, X, Y = layer.W, layer.X, layer.X_shifted
    eye_out = torch.eye(W.shape[0], dtype=W.dtype)
    eye_in = torch.eye(W.shape[1], dtype=W.dtype)
    if objective == "plain":
        return Problem(eye_out, W, eye_in)
    if objective == "fisher":
        if options.get("side") == "out":
            return Problem(layer.output.fisher_out.sqrt().diag(), W, eye_in)
        scale = layer.output.fisher_in.sqrt().diag()
        return Problem(eye_out, W @ scale, scale)
    if objective == "activation":
        scale = X.abs().mean(1).pow(options.get("alpha", 0.5)).diag()
        return Problem(eye_out, W @ scale, scale)
    if objective == "whitened":
        half = root(mixed(X @ X.T, options.get("shrink_in", 0.0), W.square().sum(0)))
        return Problem(eye_out, W @ half, half)
    if objective == "shifted":
        return Problem(eye_out, W @ Y, Y)
    if objective == "anchored":
        b = options.get("blend", 1.0)
        return Problem(eye_out, W @ (b * X + (1 - b) * Y), Y)
    tokens = X.shape[1]
    G = layer.gradients @ layer.gradients.T / tokens
    rows, columns = alike(W)
    G = mixed(G, options.get("shrink_out", 0.3), rows)
    C = mixed(X @ X.T / tokens, options.get("shrink_in", 0.0), columns)
    half = root(C)
    return Problem(root(G).T * 0.5**0.5, W @ half, half)


def make_layer(out, width, tokens, seed=0, *, dead=(), duplicate=None, decay=1.0):
    """The shifted stream is a distorted copy of the inputs with the same dead channels."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    scale = decay ** torch.arange(width, dtype=torch.float64)
    X = scale[:, None] * (normal(width, tokens) + 0.5 * normal(width, 1))
    if duplicate is not None:
        X[duplicate[1]] = X[duplicate[0]]
    X[list(dead)] = 0.0
    Y = X @ (torch.eye(tokens, dtype=X.dtype) + 0.2 * normal(tokens, tokens) / tokens**0.5)
    mix = torch.linspace(0.3, 2.0, out, dtype=torch.float64)[:, None]
    return Layer(normal(out, width), X, Y, mix * (normal(out, tokens) + normal(out, 1)))


CASES = {
    "wide": {"out": 7, "width": 12, "tokens": 60},
    "tall": {"out": 13, "width": 8, "tokens": 60},
    "square": {"out": 9, "width": 9, "tokens": 60},
    "few-tokens-wide": {"out": 8, "width": 11, "tokens": 5},
    "few-tokens-tall": {"out": 12, "width": 9, "tokens": 5},
    "dead-channels": {"out": 9, "width": 10, "tokens": 60, "dead": (0, 4, 9)},
    "duplicate-channels": {"out": 12, "width": 10, "tokens": 60, "duplicate": (2, 7)},
    "uneven": {"out": 8, "width": 10, "tokens": 60, "decay": 0.5},
}

OBJECTIVE_CASES = {
    "plain": ("plain", {}),
    "fisher": ("fisher", {}),
    "fisher-out": ("fisher", {"side": "out"}),
    "activation": ("activation", {}),
    "whitened": ("whitened", {}),
    "shifted": ("shifted", {}),
    "anchored": ("anchored", {"ridge": 0.0}),
    "anchored-ridge": ("anchored", {"ridge": 1e-8}),
    "anchored-half": ("anchored", {"blend": 0.5, "ridge": 0.0}),
    "anchored-none": ("anchored", {"blend": 0.0, "ridge": 0.0}),
    "whitened-shrunk": ("whitened", {"shrink_in": 0.2}),
    "kfac": ("kfac", {}),
    "kfac-both": ("kfac", {"shrink_in": 0.1, "shrink_out": 0.1}),
}


@dataclass(frozen=True)
class Case:
    objective: str
    options: dict
    layer: Layer
    problem: Problem

    def decompose(self, **more) -> Decomposition:
        return self.layer.decompose(self.objective, **{**self.options, **more})

    @property
    def slack(self):
        """Relative distance from the optimum; a ridge trades a little of it for tame factors."""
        return 1e-3 if self.options.get("ridge") else 1e-6

    @property
    def floor(self):
        """Values below this are rounding of the dense algebra."""
        return 1e-11 * self.problem.value(torch.zeros_like(self.layer.W))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices this small only lose time to thread pools."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(OBJECTIVE_CASES))
def objective_case(request):
    return OBJECTIVE_CASES[request.param]


@pytest.fixture(params=list(CASES))
def case(request, objective_case):
    """Every objective on every shape."""
    objective, options = objective_case
    layer = make_layer(**CASES[request.param])
    return Case(objective, options, layer, dense_problem(objective, layer, options))


@pytest.fixture
def make():
    return make_layer


@pytest.fixture
def problem_of():
    return dense_problem

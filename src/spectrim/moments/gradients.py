"""Loss gradients of every target from one backward pass per batch, reduced on the spot.

For a target `y = W x` the per-token output gradient is `g = ∂L/∂y` and `∂L/∂W = Σ_t g xᵀ`. Nothing
of the size of the model is kept unless the whole gradient is asked for: output moments are
(out, out), Fisher weights are vectors, component scores are vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.distributed.team import Team
from spectrim.errors import NonFiniteError
from spectrim.model.anatomy import Anatomy, Target
from spectrim.model.capture import first_tensor
from spectrim.model.recompute import recomputed
from spectrim.moments.accumulate import MomentAccumulator, reduction_dtype
from spectrim.moments.moments import Moments, OutputMoments, reduced

__all__ = ["ComponentScores", "GradientPass", "gradient_pass", "summed_loss"]


@dataclass
class ComponentScores:
    """First-order loss change per component of one target, in nats of the mean loss per token.

    Attributes:
        first: `ΔL_i = -⟨∂L/∂W, B_i A_i⟩` over all windows, shape (r,).
        halves: the same over the even and the odd windows, shape (2, r): sign stability.
        squares: mean over windows of the squared per-window change, shape (r,): Fisher weight.
    """

    first: Tensor
    halves: Tensor
    squares: Tensor

    @property
    def sign_stability(self) -> float:
        """Share of components whose sign agrees between the halves."""
        return float((self.halves[0].sign() == self.halves[1].sign()).double().mean())


@dataclass
class GradientPass:
    """What one gradient pass leaves behind."""

    outputs: dict[str, OutputMoments]
    inputs: dict[str, Moments] = field(default_factory=dict)
    scores: dict[str, ComponentScores] = field(default_factory=dict)
    loss: float = 0.0
    tokens: int = 0


class _TargetSums:
    """Running sums of one target over windows, of which the first has the number `first`."""

    def __init__(
        self,
        target: Target,
        needs: Collection[str],
        clip: float | None,
        factors,
        device,
        first: int = 0,
    ):
        self.target, self.needs, self.clip = target, frozenset(needs), clip
        self.first = first
        m, n = target.out_features, target.in_features
        dtype = torch.float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.G = zeros(m, m) if "G" in needs else None
        self.fisher_in = zeros(n) if "fisher" in needs else None
        self.fisher_out = zeros(m) if "fisher" in needs else None
        self.gradient = zeros(m, n) if "gradient" in needs else None
        self.factors = None
        self.halves = self.squares = None
        if factors is not None:
            self.factors = tuple(f.to(device) for f in factors)
            r = self.factors[0].shape[1]
            self.halves, self.squares = zeros(2, r), zeros(r)
        self.tokens = self.windows = 0

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add one batch: inputs x (B, T, in) and gradients g (B, T, out) of the summed loss."""
        for b in range(x.shape[0]):
            self._add_window(x[b], g[b])

    def _add_window(self, x: Tensor, g: Tensor) -> None:
        work = reduction_dtype(x)
        x, g = x.to(work), g.to(work)
        if self.G is not None:
            clipped = _clip_tokens(g, self.clip)
            self.G += (clipped.mT @ clipped).double()
            self.tokens += g.shape[0]
        if self.fisher_in is not None or self.gradient is not None:
            whole = g.mT @ x
            if self.fisher_in is not None and self.fisher_out is not None:
                squares = whole.double().square()
                self.fisher_in += squares.sum(0)
                self.fisher_out += squares.sum(1)
            if self.gradient is not None:
                self.gradient += whole.double()
        if self.factors is not None and self.halves is not None and self.squares is not None:
            up, down = (f.to(work) for f in self.factors)
            change = -((g @ up) * (x @ down.mT)).sum(0).double()
            self.halves[(self.first + self.windows) % 2] += change
            self.squares += change.square()
        self.windows += 1

    def reduce(self, team: Team) -> None:
        """Add the sums of all ranks."""
        kept = (self.G, self.fisher_in, self.fisher_out, self.gradient, self.halves, self.squares)
        numbers = torch.tensor([self.tokens, self.windows])
        team.sum_([*(s for s in kept if s is not None), numbers])
        self.tokens, self.windows = (int(n) for n in numbers)

    def check(self) -> None:
        """Refuse sums that a NaN or infinite gradient has entered; once, since it never leaves."""
        sums = (self.G, self.fisher_in, self.gradient, self.squares)
        if not all(bool(torch.isfinite(s).all()) for s in sums if s is not None):
            raise NonFiniteError(
                f"non-finite gradient at {self.target.name}: lower the window length or use "
                "--dtype float32"
            )

    def outputs(self) -> OutputMoments:
        return OutputMoments(
            self.tokens, self.windows, self.G, self.fisher_in, self.fisher_out, self.gradient
        )

    def scores(self, tokens: int) -> ComponentScores:
        """In nats of the mean loss per token: sums over `tokens`, squares per window."""
        assert self.halves is not None and self.squares is not None
        per_window = tokens / self.windows
        return ComponentScores(
            first=self.halves.sum(0) / tokens,
            halves=self.halves / tokens * 2,
            squares=self.squares / self.windows / per_window**2,
        )


def _clip_tokens(g: Tensor, clip: float | None) -> Tensor:
    """Clip each token's gradient norm to `clip` times the window's mean norm."""
    if clip is None:
        return g
    norms = g.norm(dim=1, keepdim=True)
    limit = clip * norms.mean()
    return torch.where(norms > limit, g * (limit / norms.clamp_min(limit)), g)


class _Phase:
    """Whether a batch is going forward; how many windows it has."""

    def __init__(self):
        self.forward = False
        self.windows = 0


@contextmanager
def _gradient_hooks(
    model: Any,
    sums: Mapping[str, _TargetSums],
    group_inputs: Mapping[str, Callable],
    phase: _Phase,
) -> Iterator[None]:
    """Feed every target's (input, output gradient) to its sums; removed on exit.

    Under checkpointing a block runs a second time inside the backward pass. Gradients arrive at
    the tensors of the first run, and inputs must not be counted twice, so hooks only look while
    `phase.forward` is set.
    """
    handles = []

    def attach(name: str) -> None:
        def forward(module, args, kwargs, output):
            if not phase.forward:
                return
            x = first_tensor(args, kwargs).detach()
            if name in group_inputs:
                group_inputs[name](x)
            # Some architectures flatten (B, T, d) to (B T, d) before their linear layers.
            x = x.reshape(phase.windows, -1, x.shape[-1])
            output.register_hook(lambda g: sums[name].add(x, g.reshape(*x.shape[:2], -1)))

        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(forward, with_kwargs=True))

    for name in sums:
        attach(name)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only_activations_need_gradients(model: Any) -> Iterator[None]:
    """Freeze all parameters and start the graph at the embeddings."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    was_training = model.training
    model.requires_grad_(False)
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_(True)
    )
    try:
        yield
    finally:
        handle.remove()
        model.train(was_training)
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy in nats, fp32 or better: t predicts t + 1, once."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = logits[:, :-1].to(wide).reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum")


def sampled_labels(logits: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from the model itself: they make `G` the true, not the empirical Fisher."""
    probabilities = logits[:, :-1].detach().float().softmax(-1).reshape(-1, logits.shape[-1])
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(ids.device)
    return torch.cat([ids[:, :1], drawn.reshape(ids.shape[0], -1)], dim=1)


def gradient_pass(
    model: Any,
    anatomy: Anatomy,
    ids: Tensor,
    *,
    needs: Collection[str],
    input_needs: Collection[str] = (),
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    labels: str = "data",
    clip: float | None = None,
    batch: int = 4,
    seed: int = 0,
    checkpointing: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
    team: Team | None = None,
) -> GradientPass:
    """One forward and one backward over the windows; all targets at once.

    A team splits the windows; every rank gets the sums over all of them.

    Args:
        model: the decoder, on its device.
        anatomy: its targets.
        ids: windows, (N, T) int64.
        needs: any of `G`, `fisher`, `gradient`: which output statistics to accumulate.
        input_needs: statistics of the group inputs to accumulate in the same pass.
        factors: target name -> (up (out, r), down (r, in)); gives component scores.
        labels: `data` for the next tokens of the text, `model` for tokens drawn from the model.
        clip: token gradients in `G` are clipped to this multiple of the window's mean norm.
        batch: windows per pass.
        seed: of the label draws.
        checkpointing: recompute block activations in the backward pass, for large models.
        on_batch: called with the number of windows done.
        team: the processes that share the windows; each is given all of `ids`.

    Raises:
        NonFiniteError: a gradient or the loss is not finite; names the target.
        ValueError: a team and labels from the model, whose draws follow the order of the windows.
    """
    team = team or Team()
    if team.size > 1 and labels == "model":
        raise ValueError("labels drawn from the model cannot be shared out over processes")
    mine = team.share(ids.shape[0])
    device = model.get_input_embeddings().weight.device
    sums = {
        t.name: _TargetSums(t, needs, clip, (factors or {}).get(t.name), device, mine.start)
        for t in anatomy.targets
    }
    accumulators = {
        g.targets[0].name: MomentAccumulator(g.targets[0].name, input_needs)
        for g in (anatomy.groups() if input_needs else ())
    }
    feeds = {name: a.add for name, a in accumulators.items()}
    generator = torch.Generator().manual_seed(seed)
    result = GradientPass({})
    phase = _Phase()
    with (
        _only_activations_need_gradients(model),
        recomputed([model.get_submodule(b.name) for b in anatomy.blocks], on=checkpointing),
        _gradient_hooks(model, sums, feeds, phase),
        torch.enable_grad(),
    ):
        for i in range(mine.start, mine.stop, batch):
            chunk = ids[i : min(i + batch, mine.stop)].to(device)
            phase.forward, phase.windows = True, chunk.shape[0]
            logits = model(input_ids=chunk, use_cache=False).logits
            target = sampled_labels(logits, chunk, generator) if labels == "model" else chunk
            loss = summed_loss(logits, target)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss of windows {i}..{i + len(chunk) - 1} is not finite")
            phase.forward = False
            loss.backward()
            result.loss += float(loss.detach())
            result.tokens += chunk.shape[0] * (chunk.shape[1] - 1)
            on_batch(chunk.shape[0])
    result.tokens = int(team.total(lambda: result.tokens))
    result.loss = team.total(lambda: result.loss)
    for found in sums.values():
        found.reduce(team)
        found.check()
    result.outputs = {name: s.outputs() for name, s in sums.items()}
    result.inputs = {name: reduced(a.moments(), team) for name, a in accumulators.items()}
    if factors:
        result.scores = {n: s.scores(result.tokens) for n, s in sums.items() if s.factors}
    return result

"""What backward passes say of every target, reduced on the spot to sums over windows.

For a target `y = W x` the per-token output gradient is `g = ∂L/∂y` and `∂L/∂W = Σ_t g xᵀ`. Nothing
of the size of the model is kept unless the whole gradient is asked for: output moments are
(out, out), Fisher weights are vectors, component scores are vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.team import Team
from spectrim.errors import NonFiniteError
from spectrim.model.anatomy import Group, Target
from spectrim.model.capture import first_tensor
from spectrim.moments.accumulate import accumulator_of
from spectrim.moments.experts import BlockMoments, Pool, pooled_share
from spectrim.moments.folded import Folded
from spectrim.moments.gradient_record import ComponentScores, ComponentsOf, GradientPass
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.moments.symmetric import SymmetricSum, reduction_dtype

LEVEL = 1.0
"""Nats at which the loss of one token levels off: a divergence does, its quadratic form does not,
and few tokens with large gradients would decide for all."""


class _TargetSums:
    """Running sums of one target over windows."""

    def __init__(
        self,
        target: Target,
        needs: Collection[str],
        clip: float | None,
        factors,
        device,
        dtype: torch.dtype,
    ):
        self.target, self.needs, self.clip = target, frozenset(needs), clip
        m, n = target.out_features, target.in_features

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.G = SymmetricSum(m, dtype, device) if "G" in needs else None
        self.fisher_in = zeros(n) if "fisher" in needs else None
        self.fisher_out = zeros(m) if "fisher" in needs else None
        # As large as the weight: in no more than the precision of other sums of many targets.
        wide = {"dtype": dtype, "device": device}
        self.gradient = torch.zeros(m, n, **wide) if "gradient" in needs else None
        self.factors = None
        self.halves = self.squares = self.tails = None
        if factors is not None:
            self.factors = tuple(f.to(device) for f in factors)
            r = self.factors[0].shape[1]
            self.halves, self.squares = zeros(2, r), zeros(r)
            self.tails = zeros(r) if "tails" in needs else None
        self.tokens = self.windows = self.rows = 0

    def add(self, x: Tensor, g: Tensor, number: int) -> None:
        """Add one batch: inputs x (B, T, in) and gradients g (B, T, out) of the summed loss.

        `number` is that of the batch's first window; experts come with one window at a time, and
        T is the number of its tokens that were routed to them.
        """
        if self.target.expert is not None and not bool((seen := x[0].any(1)).all()):
            x, g = x[:, seen], g[:, seen]  # a row of zeros is no token
        self.rows += x.shape[0] * x.shape[1]
        work = reduction_dtype(x)
        g = g.to(work)
        if self.G is not None:
            self.G.add(_clip_tokens(g, self.clip).flatten(0, 1), sampled=True)
            self.tokens += g.shape[0] * g.shape[1]
        if self.fisher_in is not None or self.gradient is not None:
            # One window at a time: its gradient has a weight's size.
            for one_x, one_g in zip(x.to(work), g, strict=True):
                self._add_gradient(one_g.mT @ one_x)
        if self.factors is not None and self.halves is not None and self.squares is not None:
            up, down = (f.to(work) for f in self.factors)
            by_token = (g @ up) * (x.to(work) @ down.mT)  # (B, T, r)
            change = -by_token.sum(1).double()
            halves = (number + torch.arange(len(x))) % 2
            self.halves.index_add_(0, halves.to(change.device), change)
            self.squares += change.square().sum(0)
            if self.tails is not None:
                loss = by_token.flip(-1).cumsum(-1).flip(-1).square_().mul_(0.5)
                self.tails += (loss / (1 + loss / LEVEL)).sum((0, 1), dtype=torch.float64)
        self.windows += x.shape[0]

    def _add_gradient(self, whole: Tensor) -> None:
        """Add one window's gradient of the weight, (out, in)."""
        if self.fisher_in is not None and self.fisher_out is not None:
            squares = whole.double().square()
            self.fisher_in += squares.sum(0)
            self.fisher_out += squares.sum(1)
        if self.gradient is not None:
            self.gradient += whole

    def reduce(self, team: Team) -> None:
        """Add the sums of all ranks."""
        kept = (
            self.fisher_in,
            self.fisher_out,
            self.gradient,
            self.halves,
            self.squares,
            self.tails,
        )
        numbers = torch.tensor([self.tokens, self.windows, self.rows])
        panels = [] if self.G is None else self.G.panels
        team.sum_([*panels, *(s for s in kept if s is not None), numbers])
        self.tokens, self.windows, self.rows = (int(n) for n in numbers)

    def check(self) -> None:
        """Refuse sums that a NaN or infinite gradient has entered; once, since it never leaves."""
        panels = [] if self.G is None else self.G.panels
        sums = (*panels, self.fisher_in, self.gradient, self.squares)
        # One number of all: a device is waited for once.
        if not math.isfinite(float(sum(s.sum() for s in sums if s is not None))):
            raise NonFiniteError(
                f"non-finite gradient at {self.target.name}: lower the window length or use "
                "--dtype float32"
            )

    def outputs(self, pool: Pool | None) -> OutputMoments:
        """The sums, those of an expert blended with what its pool says."""
        G, share = None if self.G is None else self.G.whole(), None
        if G is not None and pool is not None:
            G, share = pool.blended(G, self.rows), pooled_share(self.rows, len(G))
        return OutputMoments(
            self.tokens, self.windows, G, self.fisher_in, self.fisher_out, self.gradient, share
        )

    def scores(self, tokens: int) -> ComponentScores:
        """In nats of the mean loss per token: sums over `tokens`, squares per window."""
        assert self.halves is not None and self.squares is not None
        per_window = tokens / self.windows
        return ComponentScores(
            first=self.halves.sum(0) / tokens,
            halves=self.halves / tokens * 2,
            squares=self.squares / self.windows / per_window**2,
            tails=None if self.tails is None else self.tails / tokens,
        )


def _clip_tokens(g: Tensor, clip: float | None) -> Tensor:
    """Clip each token's gradient norm, (B, T, out), to `clip` times its window's mean norm."""
    if clip is None:
        return g
    norms = g.norm(dim=2, keepdim=True)
    limit = clip * norms.mean(1, keepdim=True)
    return g * (limit / norms.clamp_min(torch.finfo(g.dtype).tiny)).clamp_max(1.0)


class PassSums:
    """Running sums of some groups and their targets over the batches of one pass.

    Args:
        groups: all of a model's or of a block's.
        needs: any of `G`, `fisher`, `gradient`, `tails`: which output statistics to accumulate.
        input_needs: statistics of the group inputs to accumulate in the same pass.
        factors: target name -> (up (out, r), down (r, in)) or None; gives component scores.
        clip: token gradients in `G` are clipped to this multiple of the window's mean norm.
        device: where the sums are.
        first: number of the first window, of all processes' windows.
        dtype: of symmetric sums; every pass over a model has the same, to give the same bytes.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        needs: Collection[str],
        input_needs: Collection[str],
        factors: ComponentsOf | None,
        clip: float | None,
        device: torch.device,
        first: int,
        dtype: torch.dtype,
    ):
        self._dtype, self._like = dtype, {"dtype": dtype, "device": device}
        self._sums = {
            t.name: _TargetSums(t, needs, clip, factors(t.name) if factors else None, device, dtype)
            for group in groups
            for t in group.targets
        }
        self._groups = tuple(groups)
        self._first, self._windows, self._tokens = first, 0, 0
        self._inputs = {
            group.targets[0].name: accumulator_of(
                group, input_needs, dense=dtype, like=dtype, device=device
            )
            for group in (groups if input_needs else ())
        }

    def passed(self, windows: int, tokens: int) -> None:
        """A batch of windows of so many tokens has gone forwards and backwards."""
        self._windows += windows
        self._tokens += windows * tokens

    @contextmanager
    def watching(
        self, module_of: Callable[[str], Any], windows: Callable[[], int]
    ) -> Iterator[None]:
        """For the time of the context every backward pass through the targets is added.

        Args:
            module_of: target name -> the module that stands for it.
            windows: how many windows the batch on its way has.
        """
        handles = []

        def attach(name: str) -> None:
            def forward(_module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
                x = first_tensor(args, kwargs).detach()
                if not x.numel():
                    return  # an expert without tokens
                if name in self._inputs:
                    self._inputs[name].add(x)
                # Some architectures flatten (B, T, d) to (B T, d) before their linear layers.
                x = x.reshape(windows(), -1, x.shape[-1])
                number = self._first + self._windows
                output.register_hook(
                    lambda g: self._sums[name].add(x, g.reshape(*x.shape[:2], -1), number)
                )

            handles.append(module_of(name).register_forward_hook(forward, with_kwargs=True))

        for name in self._sums:
            attach(name)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, team: Team, *, loss: float, tokens: int) -> GradientPass:
        """The sums over all processes' windows; collective.

        Args:
            team: the processes.
            loss: summed, of all windows of all processes.
            tokens: predicted ones behind it.

        Raises:
            NonFiniteError: a gradient is not finite; names the target.
        """
        for one in self._sums.values():
            if one.target.expert is not None:
                # Tokens that go elsewhere count, with a gradient of zero.
                one.windows, one.tokens = self._windows, self._tokens
            one.reduce(team)
            one.check()
        pools = self._pools()
        # Folded everywhere: what was blended is rounded alike in every pass.
        outputs, inputs = Folded[OutputMoments](self._dtype), Folded[Moments](self._dtype)
        scores = {n: s.scores(tokens) for n, s in self._sums.items() if s.factors}
        # One after the other, so that no two copies of all sums exist.
        for name in list(self._sums):
            one = self._sums.pop(name)
            outputs.put(name, one.outputs(pools.get((one.target.block, one.target.matrix))))
        for groups in self._by_block() if self._inputs else ():
            sums = {group.index: self._inputs.pop(group.targets[0].name) for group in groups}
            for group in groups:
                if not self._windows:  # zeros, which the other processes' sums are added to
                    width = group.targets[0].in_features
                    sums[group.index].add(torch.empty(0, width, **self._like))
                sums[group.index].reduce(team)
            moments = BlockMoments(groups, sums)
            for group in groups:
                inputs.put(group.targets[0].name, moments[group.index])
        return GradientPass(outputs, inputs, scores, loss, tokens)

    def _pools(self) -> dict[tuple[int, str], Pool]:
        """Gradients at the outputs of all experts of a block, for every matrix of an expert."""
        pools: dict[tuple[int, str], Pool] = {}
        for one in self._sums.values():
            expert, target = one.target.expert, one.target
            if expert is not None and one.G is not None:
                fresh = Pool(target.out_features, common=expert.writes_common)
                pool = pools.setdefault((target.block, target.matrix), fresh)
                pool.add(one.G.whole(), one.rows)
        return pools

    def _by_block(self) -> list[list[Group]]:
        found: dict[int, list[Group]] = {}
        for group in self._groups:
            found.setdefault(group.block, []).append(group)
        return list(found.values())

"""Where along the depth a compressed network departs from the original, for several at once.

Both networks read the same windows, each its own hidden states, so that the error of a block
contains what all blocks before it did. Measured after every block and after every target layer:

    mse       mean (y - y')²                 over tokens and channels
    relative  Σ ‖y - y'‖² / Σ ‖y‖²           over tokens
    cosine    mean 1 - cos(y, y')            over tokens

AA-SVD (arXiv 2604.02119) draws the first and the last. Only one block's outputs are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.data.windows import Windows
from spectrim.errors import ModelError
from spectrim.evaluate.forward import as_windows, check_fits
from spectrim.model.anatomy import Anatomy, Block
from spectrim.model.forward import evaluating, home_device
from spectrim.model.replay import Replay, record
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module

BLOCK = "block"
"""Stands for the output of a whole block where others have a projection's path."""


@dataclass(frozen=True)
class Distortion:
    """The distance of one output of one model from the original's.

    Attributes:
        model: the name that was given to the model.
        block: index of the block.
        projection: path inside the block, or `BLOCK` for the block's own output.
        mse: mean squared difference per channel.
        relative: squared difference over the squared norm of the original output.
        cosine: mean cosine distance of a token's output, in [0, 2].
    """

    model: str
    block: int
    projection: str
    mse: float
    relative: float
    cosine: float

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass
class _Sums:
    """Running sums of one place."""

    difference: float = 0.0
    energy: float = 0.0
    cosine: float = 0.0
    tokens: int = 0
    values: int = 0

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Add the outputs (tokens, features) of a batch."""
        y, other = reference.double(), found.to(reference.device).double()
        self.difference += float((y - other).square().sum())
        self.energy += float(y.square().sum())
        self.cosine += float((1.0 - torch.cosine_similarity(y, other, dim=-1)).sum())
        self.tokens += y.shape[0]
        self.values += y.numel()

    def result(self, model: str, block: int, projection: str) -> Distortion:
        """The means."""
        # Outputs that are all zero have no relative error; a difference from them is infinite.
        relative = self.difference / self.energy if self.energy else float(self.difference > 0)
        return Distortion(
            model=model,
            block=block,
            projection=projection,
            mse=self.difference / self.values,
            relative=relative,
            cosine=max(0.0, self.cosine / self.tokens),
        )


@dataclass
class _Network:
    """One compressed model on its way through the blocks."""

    name: str
    replay: Replay
    sums: dict[tuple[int, str], _Sums] = field(default_factory=dict)


def distortion_by_depth(
    dense: nn.Module,
    compressed: Mapping[str, nn.Module],
    windows: Windows | Tensor,
    *,
    batch: int = 8,
    anatomy: Anatomy | None = None,
) -> list[Distortion]:
    """Distance of every block's and every target's output from the original's.

    Experts are left out: they see other tokens in one model than in the other.

    Args:
        dense: the original model.
        compressed: name -> a model whose modules have the original's paths.
        windows: windows, or a tensor (N, T) whose rows are the windows.
        batch: windows per forward pass.
        anatomy: the original's blocks; traced if not given.

    Returns:
        Models outermost, then blocks; a block's targets come before the block itself.

    Raises:
        ModelError: a compressed model lacks a module of the original.
        NonFiniteError: hidden states that are not finite; names the block.
    """
    windows = as_windows(windows)
    for model in (dense, *compressed.values()):
        check_fits(model, windows)
    anatomy = anatomy or trace(dense, windows.ids[:1, :8].to(home_device(dense)))
    _check_paths(anatomy, compressed)
    with ExitStack() as stack:
        for model in (dense, *compressed.values()):
            stack.enter_context(evaluating(model))
        original = _recorded(dense, windows, batch, anatomy)
        networks = [
            _Network(name, _recorded(model, windows, batch, anatomy))
            for name, model in compressed.items()
        ]
        for block in anatomy.blocks:
            for rows in original.stream.batches(batch):
                _compare_block(block, original, networks, rows)
    return [
        sums.result(network.name, block, projection)
        for network in networks
        for (block, projection), sums in network.sums.items()
    ]


def distortion_rows(found: Sequence[Distortion]) -> list[dict[str, Any]]:
    """One row per place with a column group per model, as a table or CSV wants it."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for one in found:
        row = rows.setdefault(
            (one.block, one.projection), {"block": one.block, "projection": one.projection}
        )
        for measure in ("mse", "relative", "cosine"):
            row[f"{one.model} {measure}"] = getattr(one, measure)
    return list(rows.values())


def _recorded(model: nn.Module, windows: Windows, batch: int, anatomy: Anatomy) -> Replay:
    return record(model, windows.ids, batch=batch, device=home_device(model), anatomy=anatomy)


def _compare_block(
    block: Block, original: Replay, networks: Sequence[_Network], rows: slice
) -> None:
    """Send some windows through one block of every network and compare what comes out."""
    expected = _outputs(block, original, rows)
    for network in networks:
        for projection, y in _outputs(block, network.replay, rows).items():
            sums = network.sums.setdefault((block.index, projection), _Sums())
            sums.add(expected[projection], y)


def _outputs(block: Block, replay: Replay, rows: slice) -> dict[str, Tensor]:
    """Outputs (tokens, features) of the targets and of the block; advances the stream."""
    module = replay.block(block.index)
    found: dict[str, Tensor] = {}
    with _keeping_outputs(module, [t.projection for t in block.targets if t.expert is None], found):
        hidden = replay.run(
            block.index, module, replay.stream.read(rows, home_device(replay.model))
        )
    replay.stream.write(rows, hidden)
    found[BLOCK] = hidden.flatten(0, 1)
    return found


@contextmanager
def _keeping_outputs(
    module: nn.Module, projections: Sequence[str], found: dict[str, Tensor]
) -> Iterator[None]:
    handles = []
    try:
        for projection in projections:

            def keep(_module: nn.Module, _args: tuple, output: Tensor, key: str = projection):
                found[key] = output.detach().flatten(0, -2)

            handles.append(get_module(module, projection).register_forward_hook(keep))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_paths(anatomy: Anatomy, compressed: Mapping[str, nn.Module]) -> None:
    for name, model in compressed.items():
        paths = {path for path, _ in model.named_modules()}
        missing = [t.name for t in anatomy.targets if t.expert is None and t.name not in paths]
        if missing:
            raise ModelError(
                f"{name!r} has no module {missing[0]!r} ({len(missing)} of "
                f"{len(anatomy.targets)} targets are missing); compare models of one architecture"
            )

"""What a run will take, from the configuration and the headers alone: time and peak memory.

Memory is counted as the run allocates it: what is resident all along, and on top of that the
largest of its phases. The workspace of a decomposition, in numbers of 8 bytes, is

    a p² + b m n + c n²,   p = min(m, n)

with coefficients measured on this library's decompositions of matrices of several shapes. Time is
operations over rates that are measured for a moment on the machine at hand, so it is a rough
figure; training steps are not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from spectrim.data.windows import longest_window
from spectrim.decompose import OBJECTIVES
from spectrim.errors import InputError
from spectrim.model.onload import unit_names
from spectrim.model.weights import get_module, is_linear
from spectrim.recipe import ClosedFormRefinement, Recipe
from spectrim.run.loading import read_config
from spectrim.run.memory import goes_out_of_core, resident_bytes
from spectrim.run.out_of_core import checkpoint_folder
from spectrim.run.working import resolve_device, resolve_dtype, stored_dtype
from spectrim.storage.admission import admit_folder
from spectrim.storage.shards import Shards

__all__ = ["Estimate", "Setting", "estimate_run"]

_WORKSPACE = {"plain": (0.0, 6.0, 0.0), "whitened": (1.0, 5.6, 1.1), "anchored": (9.5, 5.0, 5.5)}
"""Coefficients (a, b, c) by family of objectives."""

_FAMILY = {"fisher": "plain", "activation": "plain", "shifted": "whitened"}

_LIBRARIES = 90 * 2**20
"""Code and buffers that are loaded only when a run uses them."""

_READ_RATE = 1e9
"""Bytes per second from a disk."""


@dataclass(frozen=True)
class Setting:
    """Where and how a run will work."""

    device: torch.device
    working: torch.dtype
    stored: torch.dtype
    out_of_core: bool
    offloaded: bool
    windows: int
    window_length: int


@dataclass(frozen=True)
class Estimate:
    """A prediction.

    Attributes:
        setting: what it is for.
        host_parts: peak resident memory of the process by what takes it, bytes.
        device_parts: the same on the accelerator; empty without one.
        seconds: stage -> seconds.
        checkpoint_bytes: of the checkpoint.
    """

    setting: Setting
    host_parts: dict[str, int]
    device_parts: dict[str, int]
    seconds: dict[str, float]
    checkpoint_bytes: int

    @property
    def host_bytes(self) -> int:
        """Peak resident memory of the process."""
        return sum(self.host_parts.values())

    def summary(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "out_of_core": self.setting.out_of_core,
            "device": str(self.setting.device),
            "windows": [self.setting.windows, self.setting.window_length],
            "checkpoint_bytes": self.checkpoint_bytes,
            "host_bytes": self.host_bytes,
            "host_parts": self.host_parts,
            "device_bytes": sum(self.device_parts.values()),
            "device_parts": self.device_parts,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Sizes:
    """What the skeleton says: numbers of parameters, and the linears of the largest block."""

    width: int
    vocabulary: int
    blocks: int
    block: int
    other: int
    linears: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]

    @property
    def widest(self) -> int:
        """Largest input plus output of a linear: what an activation of a token takes."""
        return max(m + n for m, n in self.linears)


def estimate_run(
    model: str,
    recipe: Recipe,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    out_of_core: bool | None = False,
    given_ranks: bool = False,
    offloaded: bool = False,
    windows: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """Predict a run of the flows one-shot and sequential; no weight is read.

    Args:
        model: folder or name of the checkpoint.
        recipe: resolved.
        device: as for `compress`.
        dtype: as for `compress`.
        out_of_core: whether blocks stay in their files; None decides as `compress` does.
        given_ranks: whether the user brings a plan.
        offloaded: whether streams are mapped to files.
        windows: (N, T) where they differ from the recipe's.
        trust_remote_code: as for `compress`.

    Raises:
        InputError: a learned recipe, whose training is not modeled, or one that cannot be run out
            of core as asked.
        ArtifactError: the checkpoint is damaged.
    """
    if recipe.flow == "learned":
        raise InputError(f"recipe {recipe.name!r} trains on the whole model; it is not predicted")
    lazily = goes_out_of_core(
        model,
        out_of_core,
        recipe,
        device=device,
        dtype=dtype,
        kept=True,
        given_ranks=given_ranks,
        given_text=windows is not None,
        trust_remote_code=trust_remote_code,
    )
    folder = checkpoint_folder(model)
    admit_folder(folder)
    config = read_config(model, trust_remote_code)
    place = resolve_device(device)
    stored = stored_dtype(config)
    shards = Shards(folder)
    length = recipe.calibration.window_length
    length = min(length, longest_window(config) or length)
    count = windows or (recipe.calibration.windows, length)
    setting = Setting(place, resolve_dtype(dtype, stored, place), stored, lazily, offloaded, *count)
    sizes = _sizes(config, trust_remote_code)
    working = _working_parts(recipe, setting, sizes)
    weights = _weight_parts(setting, sizes, shards.bytes)
    streams = {"streams": _streams(recipe) * prod(count) * sizes.width * setting.working.itemsize}
    base = {"process": resident_bytes() + _LIBRARIES}
    if place.type == "cpu":
        host, accelerator = base | weights | streams | working, {}
    else:
        host, accelerator = base | streams, weights | working
    return Estimate(setting, host, accelerator, _times(recipe, setting, sizes), shards.bytes)


def _sizes(config: Any, trust_remote_code: bool) -> _Sizes:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    blocks = [get_module(skeleton, name) for name in unit_names(skeleton)]
    largest = max(blocks, key=_parameters)
    linears, inputs = [], []
    for parent in largest.modules():
        own = [m for m in parent.children() if is_linear(m)]
        shapes = [_shape(m) for m in own]
        linears += shapes
        for width in dict.fromkeys(n for _, n in shapes):
            alike = sum(n == width for _, n in shapes)
            # Three or more of one width are an attention's: its output projection stands alone.
            inputs += [width] * (2 if alike > 2 else 1)
    embedding = skeleton.get_input_embeddings().weight
    inside = sum(map(_parameters, blocks))
    return _Sizes(
        width=embedding.shape[1],
        vocabulary=embedding.shape[0],
        blocks=len(blocks),
        block=_parameters(largest),
        other=_parameters(skeleton) - inside,
        linears=tuple(linears),
        inputs=tuple(inputs),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _shape(linear: Any) -> tuple[int, int]:
    return (
        (linear.out_features, linear.in_features)
        if isinstance(linear, nn.Linear)
        else (tuple(reversed(linear.weight.shape)))
    )


def _weight_parts(setting: Setting, sizes: _Sizes, checkpoint: int) -> dict[str, int]:
    """Weights that are in memory while a block is worked on."""
    working, stored = setting.working.itemsize, setting.stored.itemsize
    if not setting.out_of_core:
        every = (sizes.other + sizes.blocks * sizes.block) * working
        return {"weights": every}
    return {
        "embeddings and head": sizes.other * working,
        "block": sizes.block * working,
        "next block": sizes.block * stored,
    }


def _streams(recipe: Recipe) -> int:
    """Streams that exist at the same time."""
    if recipe.flow == "sequential":
        return 3  # original, shifted, and the original behind the block
    return 1 if OBJECTIVES[recipe.decompose.objective].needs & {"C", "absolute"} else 0


def _working_parts(recipe: Recipe, setting: Setting, sizes: _Sizes) -> dict[str, int]:
    """The largest phase of the work on a block."""
    working = setting.working.itemsize
    objective = recipe.decompose.objective
    needs = OBJECTIVES[objective].needs
    tokens = min(recipe.calibration.batch, setting.windows) * setting.window_length
    if not needs & {"C", "shifted", "cross", "absolute"}:
        tokens = 0
    family = _FAMILY.get(objective, objective)
    a, b, c = _WORKSPACE.get(family, _WORKSPACE["anchored"])
    workspace = max(int(8 * (a * min(m, n) ** 2 + b * m * n + c * n * n)) for m, n in sizes.linears)
    parts = {
        "decomposition": workspace,
        "activations": tokens * (2 * sizes.width + sizes.widest) * working,
    }
    matrices = 8 * sum(n * n for n in sizes.inputs) if needs & {"C"} else 0
    if recipe.flow == "sequential":
        kinds = (
            3
            if "cross" in needs
            else 1 + any(isinstance(s, ClosedFormRefinement) for s in recipe.refine)
        )
        matrices = 8 * kinds * max(sizes.inputs) ** 2
        parts["copy of the block"] = sizes.block * working
        if not setting.offloaded:
            held = 2 * sizes.width + sizes.widest
            paused = setting.windows * setting.window_length * held * working
            parts["paused forwards"] = 2 * paused
    parts["moments"] = matrices
    if needs & {"G", "fisher"}:
        every = sum(m * m for m, _ in sizes.linears) + sum(n * n for n in sizes.inputs)
        parts["gradient moments"] = 8 * sizes.blocks * every
    return parts


def _times(recipe: Recipe, setting: Setting, sizes: _Sizes) -> dict[str, float]:
    products, decompositions = _rates(setting)
    tokens = setting.windows * setting.window_length
    needs = OBJECTIVES[recipe.decompose.objective].needs
    forwards = 2 if recipe.flow == "sequential" else int(bool(needs & {"C", "absolute"}))
    if needs & {"G", "fisher"}:
        forwards += 3
    if recipe.storage.kind != "factored" or recipe.storage.weights != "native":
        forwards += 1
    every = sizes.blocks * sizes.block
    work = sizes.blocks * sum(min(m, n) ** 2 * max(m, n) for m, n in sizes.linears)
    sums = sizes.blocks * tokens * sum(n * n for n in sizes.inputs) if forwards else 0
    copies = every * setting.stored.itemsize * (4 if setting.out_of_core else 1)
    return {
        "reading": copies / _READ_RATE,
        "forwards": 2 * forwards * every * tokens / products,
        "moments": 2 * sums / products,
        "decompositions": work / decompositions,
    }


def _rates(setting: Setting) -> tuple[float, float]:
    """Operations per second of fp32 products, and `p² max(m, n)` per second of decompositions."""
    size = 384
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(setting.device)
    (x @ x).sum().item()
    started = time.perf_counter()
    y = x
    for _ in range(4):
        y = x @ x
    y.sum().item()
    products = 4 * 2 * size**3 / (time.perf_counter() - started)
    W = x.double() if setting.device.type != "mps" else x
    started = time.perf_counter()
    torch.linalg.eigh(W @ W.mT)[0].sum().item()
    torch.linalg.qr(W)[0].sum().item()
    return products, size**3 / (time.perf_counter() - started)

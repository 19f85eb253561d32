"""What a run costs, stage by stage, from sizes alone: operations, and how many windows they allow.

Operations are counted as the passes perform them: half products for symmetric sums, one forward
per stream of a sequential flow, a pass for storing only where nothing has met the inputs before.
Training steps are not counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from spectrim.allocate.rules import RULES
from spectrim.decompose import OBJECTIVES
from spectrim.devices import in_widest, on_host
from spectrim.moments.symmetric import panel_numbers
from spectrim.recipe import BlockRefinement, DistillRefinement, LoraRefinement, Recipe
from spectrim.run.footprint import Room, Setting, Sizes
from spectrim.run.phases import has_gradients

FORWARDS = {"whole": 1, "recomputed": 2, "by block": 3}
"""Forward passes of a gradient pass; its backward pass is worth one more."""

RESTARTED = 2.2
"""Forwards of a block that begin anew at every group, in forwards."""

SAMPLING = 4.0
"""Sampling a token, in forwards of a token: products with few rows run at memory speed."""

VECTORS, SPECTRUM, SOLVED = 1.0, 0.4, 2.0
"""Decompositions: with vectors, without, and with a least-squares map before."""

NOMINAL_RATE = 30e9
"""fp32 operations per second of a CPU core, for choices that must not depend on the moment."""

PATIENCE = 600
"""Seconds that a run on a CPU may take by itself."""

LEAST_PER_CHANNEL, ENOUGH_PER_CHANNEL = 4, 64
"""Calibration tokens per input channel of the widest target: fewer are noise, more hardly help."""

MOST_TOKENS = 2**19
LONG, SHORT = 2048, 512
"""Tokens per window, with many tokens and with few."""


@dataclass(frozen=True)
class Cost:
    """Work of one stage: operations of products, and `p² max(m, n)` of decompositions."""

    products: float
    decompositions: float = 0.0


def costs(recipe: Recipe, setting: Setting, sizes: Sizes, room: Room) -> dict[str, Cost]:
    """Stages of a run of the flows one-shot and sequential, by the names of their progress.

    Args:
        recipe: resolved.
        setting: where it runs, and on which windows.
        sizes: of the model.
        room: how it is made to fit.
    """
    tokens = setting.windows * setting.window_length
    objective = OBJECTIVES[recipe.decompose.objective]
    gathers, backward = has_gradients(recipe, planned=False)
    forward = 2.0 * tokens * sizes.blocks * sizes.block
    head = 2.0 * tokens * sizes.vocabulary * sizes.width
    inputs = 2.0 * tokens * sizes.blocks * sum(map(panel_numbers, sizes.inputs))
    outputs = 2.0 * tokens * sizes.blocks * sum(panel_numbers(m) for m, _ in sizes.linears)
    crossed = 2.0 * tokens * sizes.blocks * sum(n * n for n in sizes.inputs)
    work = sizes.blocks * sum(min(m, n) ** 2 * max(m, n) for m, n in sizes.linears)
    found: dict[str, Cost] = {}
    sources = recipe.calibration.text
    if "self" in ([sources] if isinstance(sources, str) else sources):
        found["sampling"] = Cost(SAMPLING * (forward + head))
    if backward:
        share = 1.0 if gathers else min(1.0, recipe.allocate.gradient_windows / setting.windows)
        products = (FORWARDS[room.backward] + 1) * forward + 2 * head
        if "G" in objective.outputs:
            products += outputs + inputs
        held = recipe.allocate.held_out if gathers and recipe.allocate.score == "kfac" else 0.0
        found["gradients"] = Cost((share - held) * products)
        if held:
            again = (FORWARDS["by block"] - FORWARDS[room.backward]) * forward
            again += 2.0 * tokens * sizes.blocks * sum(min(s) * sum(s) for s in sizes.linears)
            found["held out"] = Cost(held * (products + again), VECTORS * work)
    sequential = recipe.flow == "sequential"
    if RULES[recipe.allocate.rule].surveys:
        plain = 0.0 if gathers or not objective.original else forward + inputs
        found["survey"] = Cost(plain, (SPECTRUM if sequential else VECTORS) * work)
    if sequential:
        streams = 2 * forward * (RESTARTED if room.restarts else 1)
        sums = inputs * (1 + (not gathers)) + (crossed if "cross" in objective.inputs else 0.0)
        found["compress"] = Cost(streams + sums, SOLVED * work)
    elif not RULES[recipe.allocate.rule].surveys:
        sums = forward + inputs if objective.original else 0.0
        found["compress"] = Cost(sums, VECTORS * work)
    if recipe.storage.kind != "factored" or recipe.storage.weights != "native":
        trains = any(
            isinstance(s, (BlockRefinement, DistillRefinement, LoraRefinement))
            for s in recipe.refine
        )
        again = trains or not (sequential and "shifted" in objective.inputs)
        found["store"] = Cost(forward + inputs if again else 0.0, SPECTRUM * work)
    return found


def stage_seconds(
    found: Mapping[str, Cost], device: torch.device, rates: tuple[float, float] | None = None
) -> dict[str, float]:
    """Seconds of every stage at the rates of this machine, measured once if they are not given."""
    products, decompositions = rates or measured_rates(device)
    return {
        stage: cost.products / products + cost.decompositions / decompositions
        for stage, cost in found.items()
    }


@cache
def measured_rates(device: torch.device) -> tuple[float, float]:
    """Operations per second of fp32 products, and `p² max(m, n)` per second of decompositions."""
    size = 384
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(device)
    (x @ x).sum().item()
    started = time.perf_counter()
    y = x
    for _ in range(4):
        y = x @ x
    y.sum().item()
    products = 4 * 2 * size**3 / (time.perf_counter() - started)
    W = in_widest(x)
    started = time.perf_counter()
    torch.linalg.eigh(W @ W.mT)[0].sum().item()
    torch.linalg.qr(W)[0].sum().item()
    return products, size**3 / (time.perf_counter() - started)


@dataclass(frozen=True)
class Settled:
    """How much a run calibrates on.

    Attributes:
        windows: how many.
        window_length: tokens of each.
        reason: why, for people; empty where the user or the recipe has said so.
    """

    windows: int
    window_length: int
    reason: str = ""


def settle(
    recipe: Recipe,
    sizes: Sizes,
    device: torch.device,
    longest: int | None,
    given: tuple[int, int] | None = None,
) -> tuple[Recipe, Settled]:
    """The recipe with its windows in numbers, and how they were found.

    Args:
        recipe: resolved.
        sizes: of the model.
        device: where it runs.
        longest: window of the model, None where it has no end.
        given: (N, T) of the user's own windows, for what the recipe leaves open.
    """
    calibration = recipe.calibration
    if given is not None:
        found = Settled(calibration.windows or given[0], calibration.window_length or given[1])
    else:
        found = settled(recipe, sizes, device, longest)
    # A length that was asked for stays as it was: what is shorter is refused or noted.
    length = calibration.window_length or found.window_length
    numbers = {"windows": found.windows, "window_length": length}
    return recipe.with_changes(calibration=numbers), found


def settled(recipe: Recipe, sizes: Sizes, device: torch.device, longest: int | None) -> Settled:
    """The windows of a recipe; what it leaves open follows the model and the machine.

    Args:
        recipe: resolved.
        sizes: of the model.
        device: where it runs.
        longest: window of the model, None where it has no end.
    """
    count, length = recipe.calibration.windows, recipe.calibration.window_length
    longest = longest or LONG
    if count is not None or recipe.flow == "learned":
        return Settled(count or MOST_TOKENS // LONG, min(length or LONG, longest))
    widest = max(n for _, n in sizes.linears)
    least, enough = LEAST_PER_CHANNEL * widest, ENOUGH_PER_CHANNEL * widest
    tokens = min(enough, MOST_TOKENS)
    reason = f"{ENOUGH_PER_CHANNEL} tokens per channel of the widest target"
    if tokens == MOST_TOKENS:
        reason = f"at most {MOST_TOKENS} tokens"
    if on_host(device):
        affordable = _affordable(recipe, sizes, device)
        if affordable < tokens:
            tokens, reason = affordable, f"about {PATIENCE // 60} minutes on this CPU"
    if tokens < least:
        tokens, reason = least, f"at least {LEAST_PER_CHANNEL} tokens per channel"
    power = 2 ** (max(1, tokens).bit_length() - 1)
    tokens = power if power >= least else 2 * power
    if length is None:
        length = LONG if tokens >= 64 * LONG else SHORT
    length = min(length, longest)
    return Settled(max(1, tokens // length), length, reason)


def calibrated_on(found: Settled) -> str:
    """Windows and reason in words."""
    reason = f" ({found.reason})" if found.reason else ""
    return f"calibrating on {found.windows} windows of {found.window_length} tokens{reason}"


def _affordable(recipe: Recipe, sizes: Sizes, device: torch.device) -> int:
    """Tokens that a run of `PATIENCE` can take on this machine's cores, however busy they are."""
    one = Setting(device, torch.float32, torch.float32, False, False, 1, SHORT)
    found = costs(recipe, one, sizes, Room(1, 1)).values()
    rate = NOMINAL_RATE * (os.cpu_count() or 1)
    # Decompositions are fp64, and about ten operations each.
    fixed = sum(20 * cost.decompositions for cost in found) / rate
    per_window = sum(cost.products for cost in found) / rate
    return int(SHORT * max(0.0, PATIENCE - fixed) / per_window) if per_window else MOST_TOKENS

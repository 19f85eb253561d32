"""How long the training of a learned recipe will take: steps by tokens by operations per token.

A rough figure, from one product timed on the machine at hand: it is there to tell minutes from days
before a training begins. Memory is not predicted.
"""

from __future__ import annotations

from pathlib import Path

from spectrim.data.windows import longest_window
from spectrim.recipe import AcipLearning, Recipe, SocoLearning
from spectrim.run.cost import measured_rates
from spectrim.run.estimate import Estimate
from spectrim.run.footprint import Room, Setting
from spectrim.run.loading import read_config
from spectrim.run.options import RunOptions
from spectrim.run.out_of_core import checkpoint_folder
from spectrim.run.working import resolve_device, resolve_dtype, stored_dtype
from spectrim.storage.shards import Shards

LITERATURE_LENGTH = 2048
"""Tokens per window where the recipe does not say."""

_BACKWARD = 2.0
"""A backward pass takes twice its forward."""

_FACTORS = 1.5
"""Two factors instead of one weight: twice the work at full rank, less as components die."""


def learning_steps(section: AcipLearning | SocoLearning) -> dict[str, int]:
    """Steps of every phase, at most."""
    if isinstance(section, AcipLearning):
        pruning = section.order_steps
        if section.order == "deaths":
            pruning = min(section.max_steps, section.steps or section.max_steps)
        return {"order": pruning, "healing": section.heal_steps}
    return {
        "sensitivities": section.sensitivity_steps,
        "explore": section.warmup_steps + section.explore_steps,
        "oscillate": section.oscillate_steps,
        "sparsify": section.sparsify_steps,
        "recover": section.recover_steps,
    }


def estimate_learning(model: str | Path, recipe: Recipe, options: RunOptions) -> Estimate:
    """Predict the time of a recipe with the flow `learned`; no weight is read.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    section = recipe.learn
    assert section is not None  # the flow says so
    config = read_config(str(model), options.trust_remote_code)
    shards = Shards(checkpoint_folder(str(model)))
    place, stored = resolve_device(options.device), stored_dtype(config)
    calibration = recipe.calibration
    length = calibration.window_length or LITERATURE_LENGTH
    length = min(length, longest_window(config) or length)
    setting = Setting(
        place,
        resolve_dtype(options.dtype, stored, place),
        stored,
        False,
        False,
        calibration.windows or 0,
        length,
    )
    tokens = section.batch * section.accumulate * length
    passes = 1 + _BACKWARD + (section.recompute == "always")
    products, _ = measured_rates(place)
    per_step = 2 * shards.bytes / stored.itemsize * tokens * passes * _FACTORS / products
    steps = learning_steps(section)
    return Estimate(
        setting=setting,
        room=Room(section.batch, section.batch),
        host_parts={},
        device_parts={},
        seconds={f"{phase}, {count} steps": count * per_step for phase, count in steps.items()},
        checkpoint_bytes=shards.bytes,
    )

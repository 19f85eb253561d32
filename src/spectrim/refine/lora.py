"""SVD-LLM's recovery: low-rank updates of one factor, merged, then of the other.

A factor `F` (all `down`, or all `up`, of the network at once) becomes `F + (alpha / r) P Q` with
small `P`, `Q`, trained on the next-token loss of any text; the update is then added to the factor,
and the other factor has its turn (arXiv 2403.07378, section 3.2). PEFT does the adapters.
Differences from the authors' code: the order of the windows is seeded, the epoch is chosen on
held-out windows, so that a stage that hurts is not merged, the learning rate falls along a cosine
instead of a line, and the warm-up takes at most a tenth of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spectrim.devices import keeps_own_random_state
from spectrim.errors import MissingExtraError
from spectrim.model.tail import Tail
from spectrim.refine.course import Course
from spectrim.refine.fitting import FitResult, FitSettings, fit
from spectrim.refine.masters import frozen
from spectrim.refine.tuning import loss_on

Part: TypeAlias = tuple[nn.Module, str]
"""A layer and the name of one of its linear parts."""

LARGEST_WARMUP = 0.1
"""Warm-up steps are at most this share of all steps."""


@dataclass(frozen=True)
class LoraTraining:
    """Hyper-parameters of one stage; defaults are the paper's."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    epochs: int = 2
    batch: int = 64
    micro_batch: int = 4
    warmup_steps: int = 100
    clip: float = 1.0
    seed: int = 0
    patience: int | None = None

    def settings(self, windows: int) -> FitSettings:
        """For a number of training windows."""
        per_epoch = -(-windows // self.batch)
        steps = self.epochs * per_epoch
        return FitSettings(
            steps=steps,
            judge_every=per_epoch,
            batch=self.batch,
            micro_batch=self.micro_batch,
            learning_rate=self.learning_rate,
            final_learning_rate=0.0,
            weight_decay=0.0,
            warmup=min(LARGEST_WARMUP, self.warmup_steps / steps),
            clip=self.clip,
            seed=self.seed,
            patience=self.patience,
        )


def require_peft(purpose: str = "the refinement step 'lora'") -> Any:
    """The package `peft`, without which there is no `purpose`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "lora", purpose) from error
    return peft


@contextmanager
def _adapted(parts: Sequence[Part], training: LoraTraining) -> Iterator[list[Any]]:
    """Adapters around some parts of layers; they are merged if the body succeeds."""
    peft = require_peft()
    # PEFT leaves marks on the module it is given: one that holds the layers and is forgotten.
    holder = nn.ModuleList([layer for layer, _ in parts])
    config = peft.LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=[f"{i}.{name}" for i, (_, name) in enumerate(parts)],
    )
    originals = [getattr(layer, name) for layer, name in parts]
    try:
        peft.inject_adapter_in_model(config, holder)
        adapters = [getattr(layer, name) for layer, name in parts]
        yield adapters
        for adapter in adapters:
            adapter.merge()
    finally:
        for (layer, name), original in zip(parts, originals, strict=True):
            setattr(layer, name, original.train(layer.training))


def recover(
    tail: Tail,
    parts: Sequence[Part],
    ids: Tensor,
    course: Course,
    training: LoraTraining,
    *,
    teacher: Tail | None = None,
) -> FitResult:
    """One stage: train adapters on one part of each layer and merge them, in place.

    Args:
        tail: of the model that holds the layers.
        parts: layers of native numbers, and which of their parts gets an adapter.
        ids: windows, (N, T).
        course: which of them are trained on and judged by, in nats per token.
        training: hyper-parameters.
        teacher: of the model to learn from; None learns the text.

    Returns:
        Loss in nats per token on the held-out windows, before and after.

    Raises:
        MissingExtraError: PEFT is not installed.
        NonFiniteError: the loss diverged; the layers are as they were.
    """
    layer, name = parts[0]
    device = getattr(layer, name).weight.device
    loss_of = loss_on(tail, ids, device, teacher)
    # Initial values and dropout draw from the global generators, which are put back afterwards.
    own = [device] if keeps_own_random_state(device) else []
    with torch.random.fork_rng(devices=own), frozen(tail.model.parameters()):
        torch.manual_seed(training.seed)
        with _adapted(parts, training) as adapters:
            trained = [p for a in adapters for p in a.parameters() if p.requires_grad]

            @contextmanager
            def without_dropout() -> Iterator[None]:
                for adapter in adapters:
                    adapter.eval()
                yield
                for adapter in adapters:
                    adapter.train()

            for adapter in adapters:
                adapter.train()
            called, settings = f"the factors {name!r} by LoRA", training.settings(len(course.train))
            return fit(called, trained, loss_of, course, settings, judging=without_dropout)

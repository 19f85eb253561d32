"""The sections of `refine`: what is trained or solved again after the cut."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spectrim.recipe.section import Section

Relative = Annotated[
    bool,
    Field(
        description="the learning rate is a share of each tensor's root mean square, which fits "
        "layers of all widths"
    ),
]


class ClosedFormRefinement(Section):
    """SVD-LLM's layer-wise update of the up factor on shifted inputs."""

    step: Literal["closed_form"] = "closed_form"
    ridge: float = Field(default=1e-6, gt=0, description="relative to the mean diagonal")


class ProjectedGradientRefinement(Section):
    """ZS-SVD's truncate-correct-retruncate; one stage is a plain one-shot truncation."""

    step: Literal["projected_gradient"] = "projected_gradient"
    stages: int = Field(default=6, ge=1)
    windows: int = Field(default=1, ge=1, description="windows behind each correction gradient")


class BlockRefinement(Section):
    """AA-SVD stage 2: train the factors of one block against the original block's output."""

    step: Literal["block"] = "block"
    epochs: int = Field(default=25, ge=1)
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    final_learning_rate: float = Field(default=0.1, ge=0, le=1, description="share of the peak")
    clip: float = Field(default=1.0, gt=0)
    held_out: float = Field(
        default=0.0625, ge=0, lt=1, description="share of windows that choose the epoch"
    )
    relative: Relative = False
    look_ahead: int = Field(
        default=0, ge=0, description="further original blocks the error is seen through"
    )


class DistillRefinement(Section):
    """End-to-end distillation: KL to the original model's logits, factors and norms trained."""

    step: Literal["distill"] = "distill"
    steps: int = Field(default=400, ge=1)
    batch: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    held_out: float = Field(default=0.125, ge=0, lt=1)
    relative: Relative = False
    evaluate_every: int = Field(default=25, ge=1)
    windows: int | None = Field(
        default=None,
        ge=1,
        description="further training windows, sampled from the original model itself; None "
        "trains on the calibration windows alone",
    )


class LoraRefinement(Section):
    """SVD-LLM's sequential recovery: LoRA on one factor, merged, then on the other."""

    step: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    epochs: int = Field(default=2, ge=1)
    batch: int = Field(default=64, ge=1)
    warmup_steps: int = Field(default=100, ge=0, description="never more than a tenth of all steps")
    held_out: float = Field(
        default=0.125, ge=0, lt=1, description="share of windows that choose the epoch"
    )
    order: tuple[Literal["down", "up"], ...] = Field(default=("down", "up"), min_length=1)


Refinement = Annotated[
    ClosedFormRefinement
    | ProjectedGradientRefinement
    | BlockRefinement
    | DistillRefinement
    | LoraRefinement,
    Field(discriminator="step"),
]

"""The parts of a recipe that train gates or scores on components."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spectrim.recipe.section import Section


class AcipLearning(Section):
    """ACIP: gates with an exponentially growing pressure; the order of deaths is the product.

    Defaults are the published ones for 7B models, except where the description says `ours`. The
    published behavior is `gate_dtype: bfloat16, weigh_by_cost: false, heal_parts: corrections,
    heal_sizes: stop, heal_objective: cross_entropy, heal_final_learning_rate: 1` with the
    objective `plain`.
    """

    method: Literal["acip"] = "acip"
    stop_keep: float = Field(
        default=0.4, gt=0, lt=1, description="smallest size; pruning stops there"
    )
    batch: int = Field(default=4, ge=1, description="windows per forward pass")
    accumulate: int = Field(default=1, ge=1, description="forward passes per step")
    gate_scale: float = Field(default=0.02, gt=0, description="c, where gates start")
    gate_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="ours is float32: steps of 5e-5 round away in bfloat16"
    )
    learning_rate: float = Field(default=5e-5, gt=0, description="of the gates")
    lora_rank: int = Field(default=32, ge=0, description="0 trains gates alone")
    lora_alpha: float = Field(default=16, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    lora_learning_rate: float = Field(default=5e-5, gt=0)
    clip: float | None = Field(
        default=None, gt=0, description="largest gradient norm of the corrections"
    )
    pressure: float = Field(default=1e-3, gt=0, description="λ of the first step, without `steps`")
    pressure_growth: float = Field(default=1.01, gt=1)
    pressure_every: int = Field(default=4, ge=1, description="steps between two growths of λ")
    steps: int | None = Field(
        default=None,
        ge=1,
        description="ours: λ follows a path that reaches the stop in about this many",
    )
    max_steps: int = Field(default=50_000, ge=1)
    weigh_by_cost: bool = Field(default=True, description="ours: penalties in proportion to m + n")
    size_every: int = Field(default=10, ge=1, description="steps between two tests for the stop")
    order: Literal["deaths", "fisher"] = Field(
        default="deaths",
        description="fisher: by one pass of squared gate gradients, without training gates",
    )
    order_steps: int = Field(default=64, ge=1, description="batches behind the fisher order")
    heal_steps: int = Field(default=1000, ge=0)
    heal_parts: Literal["auto", "corrections", "factors"] = Field(
        default="auto",
        description="ours is factors: the ordered factors are trained along, in fp32; auto does "
        "so below a billion parameters",
    )
    heal_sizes: Literal["stop", "sampled"] = Field(
        default="sampled", description="ours: every step heals another size"
    )
    heal_objective: Literal["cross_entropy", "kl"] = Field(
        default="kl", description="ours: the divergence from the original model"
    )
    heal_learning_rate: float = Field(default=5e-5, gt=0, description="of the corrections")
    heal_factor_learning_rate: float = Field(default=5e-5, gt=0)
    heal_final_learning_rate: float = Field(
        default=0.1, ge=0, le=1, description="share of the peak"
    )
    heal_grid: int = Field(default=24, ge=1, description="sizes to sample from")
    recompute: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="activations in the backward pass; auto from a billion parameters on",
    )
    checkpoint_every: int = Field(default=100, ge=1)


class SocoLearning(Section):
    """SoCo: importance scores on the spectrum, three phases, survivors rescaled."""

    method: Literal["soco"] = "soco"
    parts: Literal["all", "selection", "rescaling", "allocation"] = Field(
        default="all", description="which effect of the scores to use"
    )
    score: Literal["sigmoid", "softplus", "relu"] = "sigmoid"
    deviation: bool = Field(
        default=True, description="train d where a target has a bias to fold it into"
    )
    threshold: float = Field(default=0.5, gt=0, lt=1)
    batch: int = Field(default=8, ge=1, description="windows per forward pass")
    accumulate: int = Field(default=1, ge=1, description="forward passes per step")
    learning_rate: float = Field(default=2e-2, gt=0, description="of the scores")
    deviation_learning_rate: float = Field(default=1e-3, gt=0)
    clip: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    explore_steps: int = Field(default=500, ge=1)
    oscillate_steps: int = Field(default=600, ge=0)
    sparsify_steps: int = Field(default=400, ge=1)
    recover_steps: int = Field(default=100, ge=0)
    recover_learning_rate: float = Field(default=1e-2, gt=0)
    pressure_growth: float = Field(default=1.02, gt=1, description="of λ, per step under pressure")
    pressure_cap: float = Field(
        default=2.0, gt=0, description="largest pressure, in learning rates"
    )
    sparsity: float = Field(
        default=1.0, ge=0, description="push of low scores to zero, in learning rates"
    )
    hysteresis: float = Field(default=0.02, ge=0, lt=1)
    settled: float = Field(
        default=0.99, gt=0, le=1, description="overlap of kept sets that ends phase two"
    )
    undecided: float = Field(
        default=0.001, ge=0, lt=1, description="share of scores that ends phase three"
    )
    dead_after: int = Field(
        default=20, ge=1, description="steps below the threshold before a final death"
    )
    hard: bool = Field(default=True, description="low scores take no part in the forward pass")
    sensitivity_steps: int = Field(default=32, ge=1, description="batches behind the sensitivities")
    recompute: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="activations in the backward pass; auto from a billion parameters on",
    )
    checkpoint_every: int = Field(default=100, ge=1)

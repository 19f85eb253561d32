"""Recipes: the complete, frozen, serialisable description of a run.

A recipe is data. It names one choice for every stage of the flow
`calibrate -> decompose -> allocate -> store -> refine`; defaults live here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from spectrim.errors import RecipeError
from spectrim.formats import known_weights
from spectrim.layers.layout import known_kind
from spectrim.plain_yaml import parse_plain, read_bounded

__all__ = [
    "AcipLearning",
    "Allocation",
    "BlockRefinement",
    "Calibration",
    "ClosedFormRefinement",
    "Decompose",
    "DistillRefinement",
    "LoraRefinement",
    "ProjectedGradientRefinement",
    "Recipe",
    "Refinement",
    "SocoLearning",
    "StorageChoice",
]


class Section(BaseModel):
    """Base of all parts of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(Section):
    """Which text the statistics come from.

    `text` is a source name (`wikitext2`, `c4`, `ptb`, `self`), a file, or several of them, which
    then share the windows equally.
    """

    text: str | tuple[str, ...] = "self"
    windows: int | None = Field(
        default=None, ge=1, lt=2**31, description="None follows the model and the machine"
    )
    window_length: int | None = Field(
        default=None, ge=2, lt=2**31, description="tokens; None is 2048, or 512 where there are few"
    )
    bos: Literal["none", "each", "half"] = Field(
        default="none", description="BOS at the start of no window, of each, or of every second one"
    )
    batch: int | None = Field(
        default=None, ge=1, description="windows per forward pass; None follows the memory"
    )


Objective = Literal[
    "plain", "fisher", "activation", "whitened", "shifted", "anchored", "kfac", "anchored_kfac"
]


class Decompose(Section):
    """The objective whose best rank-k answer the components are ordered for."""

    objective: Objective = "whitened"
    alpha: float = Field(default=0.5, ge=0, le=2, description="activation: exponent of mean |x|")
    blend: float = Field(
        default=1.0, ge=0, le=1, description="anchored: 1 is anchored (AA-SVD), 0 is shift-aware"
    )
    ridge: float | None = Field(
        default=None,
        ge=0,
        description="anchored: pull of the least-squares map toward W, relative; None lets the "
        "data choose",
    )
    shrink_in: float = Field(default=0.0, ge=0, lt=1, description="share of the prior in C")
    shrink_out: float = Field(default=0.3, ge=0, lt=1, description="kfac: share of the prior in G")
    clip: float | None = Field(
        default=10.0,
        gt=0,
        description="kfac: token gradients are clipped to this multiple of the mean norm",
    )


class Allocation(Section):
    """How the budget is shared among the targets."""

    rule: Literal["uniform", "loss_ratio", "sensitivity", "zero_sum", "knapsack"] = "uniform"
    score: Literal["energy", "first_order", "second_order", "measured", "kfac"] = "energy"
    floor: float = Field(default=0.0, ge=0, lt=1, description="least rank as a share of break-even")
    multiple: int = Field(default=1, ge=1, description="ranks are multiples of this")
    fill: bool = Field(
        default=True, description="spend what rounding leaves; False gives the papers' floor ranks"
    )
    experts: Literal["each", "equal"] = Field(default="each", description="ranks within a block")
    faithful: bool = Field(
        default=False, description="zero_sum: as published, reverted targets keep their sum"
    )
    gradient_windows: int = Field(default=32, ge=1, description="windows behind gradient scores")
    sensitivity_windows: int = Field(
        default=32, ge=1, description="windows behind ASVD's measured sensitivities"
    )


class StorageChoice(Section):
    """How a rank-k matrix is kept on disk and in memory."""

    kind: Annotated[str, AfterValidator(known_kind)] = "factored"
    weights: Annotated[str, AfterValidator(known_weights)] = "native"


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
    relative: bool = Field(
        default=False,
        description="the learning rate is a share of each tensor's root mean square, which fits "
        "layers of all widths",
    )
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
    relative: bool = Field(
        default=False,
        description="the learning rate is a share of each tensor's root mean square, which fits "
        "layers of all widths",
    )
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


Learning = Annotated[AcipLearning | SocoLearning, Field(discriminator="method")]


class Recipe(Section):
    """The complete description of a run.

    `flow` says how the model is walked: `one-shot` decides everything from the original model;
    `sequential` goes block by block with an original and a shifted stream; `learned` trains
    scores on the components.
    """

    name: str
    title: str = ""
    paper: str = ""
    equation: str = ""
    differences: str = Field(
        default="", description="where we differ from the authors' code, and why"
    )
    flow: Literal["one-shot", "sequential", "learned"] = "one-shot"
    keep: float = Field(default=0.6, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    partly: bool = Field(default=False, description="compress what is understood of a model")
    calibration: Calibration = Calibration()
    decompose: Decompose = Decompose()
    allocate: Allocation = Allocation()
    storage: StorageChoice = StorageChoice()
    refine: tuple[Refinement, ...] = ()
    learn: Learning | None = None

    def hash(self) -> str:
        """SHA-256 of everything that influences the result; prose and order of keys do not."""
        content = self.model_dump(
            mode="json", exclude={"title", "paper", "equation", "differences"}
        )
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_yaml(self) -> str:
        """YAML that `Recipe.from_yaml` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "recipe") -> Recipe:
        """Parse and validate; raises `RecipeError` naming the field and what it allows."""
        return validated(cls, parse_plain(text, source=source), source=source)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe file; raises `RecipeError` as `from_yaml`, and for a file that is none."""
        return cls.from_yaml(read_bounded(path), source=str(path))

    def with_changes(self, **changes: Any) -> Recipe:
        """A validated copy; nested sections are given as mappings of the fields to change."""
        data = self.model_dump(mode="json")
        for key, value in changes.items():
            if isinstance(value, dict) and isinstance(data.get(key), dict):
                data[key] = {**data[key], **value}
            else:
                data[key] = value
        return validated(type(self), data, source=f"recipe {self.name!r}")


def validated(cls: type[Recipe], data: dict[str, Any], *, source: str) -> Recipe:
    """Build a recipe, turning pydantic's errors into one `RecipeError` that names each field."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()
        )
        raise RecipeError(f"{source} is not a valid recipe: {problems}") from error

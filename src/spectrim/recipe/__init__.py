"""Recipes: the complete, frozen, serialisable description of a run.

A recipe is data. It names one choice for every stage of the flow
`calibrate -> decompose -> allocate -> store -> refine`; defaults live here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from spectrim.allocate.curve import Score
from spectrim.allocate.rules import RULES, known_rule
from spectrim.decompose import OBJECTIVES, known_objective
from spectrim.errors import RecipeError
from spectrim.formats import known_patterns, known_weights
from spectrim.layers.layout import known_storage
from spectrim.plain_yaml import parse_plain, read_bounded
from spectrim.recipe.learning import AcipLearning, SocoLearning
from spectrim.recipe.refinement import (
    BlockRefinement,
    ClosedFormRefinement,
    DistillRefinement,
    LoraRefinement,
    ProjectedGradientRefinement,
    Refinement,
)
from spectrim.recipe.section import Section
from spectrim.recipe.targets import OwnChoice, Targets

__all__ = [
    "AcipLearning",
    "Allocation",
    "BlockRefinement",
    "Calibration",
    "ClosedFormRefinement",
    "Decompose",
    "DistillRefinement",
    "LoraRefinement",
    "OwnChoice",
    "ProjectedGradientRefinement",
    "Recipe",
    "Refinement",
    "SocoLearning",
    "StorageChoice",
    "Targets",
]

Step = TypeVar("Step", bound=Section)


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


class Decompose(Section):
    """The objective whose best rank-k answer the components are ordered for.

    Further options are those that the objective's function takes.
    """

    model_config = ConfigDict(extra="allow")

    objective: Annotated[str, AfterValidator(known_objective)] = "whitened"
    alpha: float = Field(default=0.5, ge=0, le=2, description="activation: exponent of mean |x|")
    blend: float = Field(
        default=1.0, ge=0, le=1, description="anchored: 1 is anchored (AA-SVD), 0 is shift-aware"
    )
    carry: bool = Field(
        default=False,
        description="anchored: what adds to the residual stream makes up for what that has lost",
    )
    ridge: float | None = Field(
        default=None, ge=0, description="anchored: pull toward W, relative; None: by the data"
    )
    shrink_in: float = Field(default=0.0, ge=0, lt=1, description="share of the prior in C")
    shrink_out: float = Field(default=0.3, ge=0, lt=1, description="kfac: share of the prior in G")
    clip: float | None = Field(
        default=10.0,
        gt=0,
        description="kfac: token gradients are clipped to this multiple of the mean norm",
    )

    @model_validator(mode="after")
    def _own_options(self) -> Decompose:
        extra = self.__pydantic_extra__ or {}
        options = OBJECTIVES[self.objective].options if extra else {}
        for name, value in extra.items():
            if name not in options:
                raise ValueError(
                    f"{name!r} is no option of the objective {self.objective!r}, which takes "
                    f"{', '.join(options) or 'none'}"
                )
            TypeAdapter(options[name].annotation).validate_python(value)
        return self


class Allocation(Section):
    """How the budget is shared among the targets."""

    rule: Annotated[str, AfterValidator(known_rule)] = "uniform"
    score: Score = "energy"
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
    held_out: float = Field(
        default=0.0, ge=0, le=0.5, description="kfac: share of the windows that losses are seen on"
    )
    sensitivity_windows: int = Field(
        default=32, ge=1, description="windows behind ASVD's measured sensitivities"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_written_before(cls, data: Any) -> Any:
        # Results and surveys of earlier versions name a field that is gone; 0 was its default.
        if isinstance(data, dict) and data.get("probe_windows") == 0:
            return {name: value for name, value in data.items() if name != "probe_windows"}
        return data

    @property
    def needed_scores(self) -> frozenset[str]:
        """What a survey must hold besides spectra; `table` for measured sensitivities."""
        return RULES[self.rule].scores(self.score)


class StorageChoice(Section):
    """How a rank-k matrix is kept on disk and in memory; with `dense` nothing is cut."""

    kind: Annotated[str, AfterValidator(known_storage)] = "factored"
    weights: Annotated[str, AfterValidator(known_weights)] = "native"
    alike: bool = Field(
        default=False,
        description="one form for targets that read the same inputs (q/k/v, gate/up): engines "
        "that fuse them want it",
    )
    formats: Annotated[tuple[str, ...], AfterValidator(known_patterns)] = Field(
        default=("*",), description="patterns of what weights auto may choose besides native"
    )


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
    targets: Targets = Targets()
    calibration: Calibration = Calibration()
    decompose: Decompose = Decompose()
    allocate: Allocation = Allocation()
    storage: StorageChoice = StorageChoice()
    refine: tuple[Refinement, ...] = ()
    learn: Learning | None = None

    @property
    def reads_text(self) -> bool:
        """Whether its components or its ranks depend on text."""
        objective, rule = OBJECTIVES[self.decompose.objective], RULES[self.allocate.rule]
        return bool(objective.needs) or rule.surveys

    @property
    def gives_every_size(self) -> bool:
        """Whether one training gives all its sizes."""
        return self.flow == "learned" and isinstance(self.learn, AcipLearning)

    def hash(self) -> str:
        """SHA-256 of everything that influences the result; prose and order of keys do not."""
        passed: dict[str, Any] = dict.fromkeys(("title", "paper", "equation", "differences"), True)
        # Recipes that choose nothing keep the hash they always had.
        if self.targets == Targets():
            passed["targets"] = True
        if self.allocate.experts == "each":
            passed["allocate"] = {"experts"}
        content = self.model_dump(mode="json", exclude=passed)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def first(self, kind: type[Step]) -> Step | None:
        """The first refinement of a kind, None where there is none."""
        return next((step for step in self.refine if isinstance(step, kind)), None)

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

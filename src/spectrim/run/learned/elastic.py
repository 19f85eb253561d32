"""A model that takes any size in memory, and the artifact cut to an ordinary folder.

The factors of every target lie in memory once, most important component first. A size is a set of
views into them, so that resizing copies nothing and can be undone; targets that are dense at a
size are the base model's own modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.allocate.budget import keep_for_size
from spectrim.allocate.curve import loss_by_rank
from spectrim.allocate.elastic import elastic_order
from spectrim.allocate.ladder import Limits
from spectrim.allocate.plan import Plan
from spectrim.arguments import check_path, refuse_unused
from spectrim.errors import ArtifactError, BudgetError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.swap import dense_shape
from spectrim.model.weights import get_module, is_transposed, read_bias, read_weight, replace_module
from spectrim.run.experts import open_experts
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.options import RunOptions
from spectrim.run.planning import best_score
from spectrim.sizes import parse_size
from spectrim.storage.elastic import BASE_FOLDER, Base, Elastic, load_elastic
from spectrim.storage.survey_file import is_survey, load_factors, load_survey
from spectrim.storage.survey_record import Survey


@dataclass(frozen=True)
class Sizes:
    """What an elastic model can be resized to.

    Attributes:
        smallest_keep: least keep.
        smallest_bytes: of the whole checkpoint at that keep.
        largest_bytes: of the whole checkpoint, dense.
    """

    smallest_keep: float
    smallest_bytes: int
    largest_bytes: int


class ElasticModel:
    """A loaded model that changes its size in place.

    Attributes:
        model: the base model, dense until the first `resize`.
        tokenizer: its tokenizer, or None.
        elastic: the artifact.
        plan: of the current size, None while it is dense.
    """

    def __init__(self, loaded: LoadedModel, elastic: Elastic):
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.elastic = elastic
        self.plan: Plan | None = None
        self._originals: dict[str, nn.Module] = {}
        self._layers: dict[str, LowRankLinear] = {}
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for curve in elastic.order.curves:
            original = get_module(self.model, curve.name)
            shape = (curve.shape.out_features, curve.shape.in_features)
            if dense_shape(original, curve.name) != shape:
                raise ArtifactError(
                    f"{curve.name} is {dense_shape(original, curve.name)} in the base model, "
                    f"{shape} in the artifact"
                )
            W = read_weight(original)
            up, down = elastic.factors[curve.name]
            self._originals[curve.name] = original
            # Transposed, so that the first components of both factors are contiguous.
            self._factors[curve.name] = (up.T.contiguous().to(W), down.contiguous().to(W))
            self._layers[curve.name] = _shell(original, shape)

    @property
    def sizes(self) -> Sizes:
        """The reachable sizes."""
        order, other = self.elastic.order, self.elastic.base.other_bytes
        return Sizes(order.smallest_keep, order.smallest_bytes + other, order.dense_bytes + other)

    def keep_of(self, size: int | str) -> float:
        """The keep at which the whole checkpoint has at most `size` bytes.

        Raises:
            BudgetError: out of reach; names the possible sizes.
        """
        order = self.elastic.order
        return keep_for_size(
            parse_size(size),
            other_bytes=self.elastic.base.other_bytes,
            targets_dense_bytes=order.dense_bytes,
            smallest_keep=order.smallest_keep,
        )

    def planned(self, keep: float) -> Plan:
        """What a size would be, without taking it."""
        return self.elastic.order.plan(keep)

    def resize(
        self, keep: float | None = None, *, size: int | str | None = None, repair: bool = False
    ) -> Plan:
        """Change the size in place, at once and reversibly.

        Args:
            keep: fraction of the target bytes; 1 is exactly the base model.
            size: instead of keep, of the whole checkpoint.
            repair: spend what is left of the budget; sizes are then not strictly nested.

        Raises:
            BudgetError: below the smallest size, which the message names.
        """
        if (keep is None) == (size is None):
            raise BudgetError("give either a keep or a size")
        wanted = keep if keep is not None else self.keep_of(size or 0)
        plan = self.elastic.order.plan(wanted, repair=repair)
        for entry in plan.entries:
            if entry.rank is None:
                replace_module(self.model, entry.name, self._originals[entry.name])
                continue
            layer = self._layers[entry.name]
            up, down = self._factors[entry.name]
            layer.rank = layer.up.in_features = layer.down.out_features = entry.rank
            layer.up.weight = nn.Parameter(up[: entry.rank].T, requires_grad=False)
            layer.down.weight = nn.Parameter(down[: entry.rank], requires_grad=False)
            replace_module(self.model, entry.name, layer)
        self.plan = plan
        return plan

    def settle(self) -> nn.Module:
        """The model with memory of its own for the current size, as any compressed model.

        The elastic model is not to be resized afterwards.
        """
        for name, layer in self._layers.items():
            if get_module(self.model, name) is layer:
                W, up, down = layer.up.weight, layer.up.weight.detach(), layer.down.weight.detach()
                small = LowRankLinear.from_factors(
                    up, down, layer.bias, dtype=W.dtype, device=W.device
                )
                small.transposed = layer.transposed
                replace_module(self.model, name, small)
        return self.model


def _shell(original: nn.Module, shape: tuple[int, int]) -> LowRankLinear:
    """A layer without factors of its own; the bias is the original's."""
    bias = read_bias(original)
    layer = LowRankLinear.empty(shape[1], shape[0], 1, bias is not None)
    if bias is not None:
        layer.up.bias = nn.Parameter(bias, requires_grad=False)
    layer.transposed = is_transposed(original)
    return layer.train(original.training)


def open_elastic(
    artifact: str | Path | Elastic | Survey,
    options: RunOptions = RunOptions(),
    *,
    base: str | Path | nn.Module | None = None,
    score: str | None = None,
) -> ElasticModel:
    """Load an artifact with its base model.

    Args:
        artifact: a folder with an elastic artifact or a survey, or an artifact in memory.
        options: how the base model is loaded.
        base: where the base model lies now, if not under its recorded name.
        score: of a survey, what its components are ordered by.

    Raises:
        ArtifactError: a damaged artifact, or a base model that is not the recorded one.
        ModelError: the base model cannot be loaded.
    """
    check_path(artifact=artifact if not isinstance(artifact, Elastic | Survey) else None)
    known = artifact
    if isinstance(known, (str, Path)):
        known = load_survey(known) if is_survey(known) else load_elastic(known)
    if isinstance(known, Elastic):
        refuse_unused("an elastic artifact has its order", {"score": score})
    loaded = load_model(_place(known) if base is None else base, options)
    if isinstance(known, Survey):
        known = elastic_from_survey(known, dtype=loaded.stored_dtype, score=score)
    open_experts(loaded)
    found = loaded.identity()
    if found != known.base.identity:
        raise ArtifactError(
            f"the base model {loaded.name!r} is not the one this artifact was made from "
            f"(identity {found[:12]}, expected {known.base.identity[:12]}); give the original "
            "checkpoint as base"
        )
    return ElasticModel(loaded, known)


def _place(known: Elastic | Survey) -> str | Path:
    """Where the base model was when the artifact was made, or lies inside it."""
    if isinstance(known, Survey):
        return known.model_name
    if known.base.self_contained and known.folder is not None:
        return known.folder / BASE_FOLDER
    return known.base.name


def elastic_from_survey(survey: Survey, *, dtype: torch.dtype, score: str | None = None) -> Elastic:
    """Any survey's scores as one order of components: every size, as from a training.

    Components of a target are removed from the last to the first, across targets by predicted
    loss per byte, so that factors can be cut as slices.

    Args:
        survey: with factors, in memory or on disk.
        dtype: of the base checkpoint, which a survey does not name.
        score: `kfac`, `second_order`, `first_order` or `energy`; the best there is by default.

    Raises:
        ArtifactError: the survey holds no factors or no key.
        InputError: it lacks the score.
    """
    if survey.key is None:
        raise ArtifactError(f"the survey of {survey.model_name} does not say what it was made from")
    chosen: Any = score or best_score(survey)
    curves = survey.curves_for(chosen)
    limits = Limits(dtype_bytes=survey.dtype_bytes)
    importance = []
    for curve in curves:
        held = load_factors(survey, curve.name).rank
        falls = -torch.diff(torch.from_numpy(loss_by_rank(curve, chosen).copy()))
        cost = curve.shape.out_features + curve.shape.in_features
        importance.append((falls[:held] / cost,))
    bare = [replace(c, energy=None, score=None, loss=None) for c in curves]
    order, kept = elastic_order(bare, importance, limits=limits, spectral=True)
    factors = {}
    for curve, index in zip(bare, kept, strict=True):
        whole = load_factors(survey, curve.name)
        factors[curve.name] = (whole.up[:, index], whole.down[index])
    base = Base(
        name=survey.model_name,
        identity=survey.key.model,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        other_bytes=survey.other_bytes,
    )
    return Elastic(order, factors, base, chosen)

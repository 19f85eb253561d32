"""Elastic artifacts and surveys as models that take any size."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from spectrim.run.learned.elastic import ElasticModel, open_elastic
from spectrim.storage.elastic import is_elastic
from spectrim.storage.survey_file import is_survey
from spectrim.studies.measure import Measure


def has_every_size(model: str | Path | nn.Module) -> bool:
    """Whether it is a folder that needs no recipe to give every size."""
    return not isinstance(model, nn.Module) and (is_elastic(model) or is_survey(model))


def open_sizes(folder: Path, measure: Measure) -> ElasticModel:
    """The artifact with its base model, as the study measures."""
    return open_elastic(folder, measure.options)


def dense_twin(model: nn.Module) -> nn.Module:
    """A second tree of modules over the same tensors: it stays dense while the first is resized."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)

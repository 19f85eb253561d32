"""From a training that gives every size, or a survey that could, to the elastic artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spectrim.allocate.budget import format_bytes
from spectrim.devices import HOST
from spectrim.recipe import Recipe, validated
from spectrim.run.compress import Outcome
from spectrim.run.learned.elastic import open_elastic
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.run.sources import sources_of
from spectrim.storage.atomic import check_output
from spectrim.storage.elastic import Elastic, save_elastic
from spectrim.storage.folder import Papers
from spectrim.storage.origin import read_origin
from spectrim.storage.paths import last_part, without_folders
from spectrim.storage.survey_file import load_survey
from spectrim.storage.survey_record import Survey


def save_elastic_outcome(
    outcome: Outcome,
    output: str | Path,
    *,
    overwrite: bool = False,
    original: str | Path | None = None,
) -> None:
    """Write the artifact; with `original` the base checkpoint is read again and included.

    Raises:
        OutputError: the destination is taken or cannot be written; nothing is left there.
        ModelError: the original cannot be loaded.
    """
    assert outcome.elastic is not None
    sizes = _sizes(outcome.elastic)
    outcome.report["elastic"] = sizes
    outcome.report["notes"].append(
        f"written as an elastic artifact: `spectrim resize` gives every keep from "
        f"{sizes['smallest_keep']:.4f} to 1"
    )
    base = None if original is None else load_model(original, RunOptions(device=HOST))
    save_elastic(
        outcome.elastic,
        output,
        _papers(outcome.elastic, outcome.recipe, outcome.report),
        base_model=None if base is None else base.model.to(base.stored_dtype),
        tokenizer=outcome.tokenizer,
        overwrite=overwrite,
    )


def save_survey_as_elastic(
    survey: Survey | str | Path,
    output: str | Path,
    *,
    score: str | None = None,
    base: str | Path | None = None,
    self_contained: bool = False,
    overwrite: bool = False,
) -> Elastic:
    """Write a survey's components, ordered by one of its scores, as an elastic artifact.

    Args:
        survey: in memory, or its folder.
        output: a new or empty folder, or an artifact with `overwrite`.
        score: see `elastic_from_survey`.
        base: where the base model lies now, if not under its recorded name.
        self_contained: include the base checkpoint.
        overwrite: replace the artifact that is there.

    Raises:
        ArtifactError: the base model is not the surveyed one.
        InputError: the survey lacks the score.
        OutputError: the destination is taken or cannot be written; nothing is left there.
    """
    check_output(output, overwrite=overwrite, sources=sources_of(survey=survey, model=base))
    if not isinstance(survey, Survey):
        survey = load_survey(survey)
    opened = open_elastic(survey, RunOptions(device=HOST), base=base, score=score)
    recipe = validated(Recipe, survey.recipe, source=f"the survey of {survey.model_name}")
    elastic = opened.elastic
    report = {
        "format_version": 1,
        "model": survey.model_name,
        "calibration": survey.facts.get("calibration"),
        "elastic": {**_sizes(elastic), "score": elastic.source},
        "notes": list(survey.notes),
    }
    save_elastic(
        elastic,
        output,
        _papers(elastic, recipe, report),
        base_model=opened.model.to(elastic.dtype) if self_contained else None,
        tokenizer=opened.tokenizer,
        overwrite=overwrite,
    )
    return elastic


def _sizes(elastic: Elastic) -> dict[str, Any]:
    order, other = elastic.order, elastic.base.other_bytes
    return {
        "smallest_keep": order.smallest_keep,
        "smallest_bytes": order.smallest_bytes + other,
        "largest_bytes": order.dense_bytes + other,
    }


def _papers(elastic: Elastic, recipe: Recipe, report: Mapping[str, Any]) -> Papers:
    order, other = elastic.order, elastic.base.other_bytes
    name = last_part(elastic.base.name)
    origin = read_origin(elastic.base.name)
    matter = {**origin.matter, "library_name": "spectrim", "tags": ["spectrim", "low-rank"]}
    if origin.hub_id:
        matter["base_model"] = origin.hub_id
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---",
        f"# {name} at every size",
        f"Ordered low-rank components of the linear layers of `{name}`, made "
        "by [spectrim](https://github.com/spectrim/spectrim) with the recipe "
        f"`{recipe.name}`. This folder is no model by itself: it gives one of any "
        f"size from {format_bytes(order.smallest_bytes + other)} (keep "
        f"{order.smallest_keep:.4f}) to {format_bytes(order.dense_bytes + other)} (dense).",
        "```python\nimport spectrim\n\n"
        'elastic = spectrim.load_elastic("this-folder")\n'
        f"elastic.resize({max(order.smallest_keep, 0.5):.2f})  # at once, and reversible\n"
        "elastic.model\n```",
        "```\nspectrim resize this-folder --keep 0.5 -o smaller\n```",
        f"```yaml\n{without_folders(recipe.to_yaml()).rstrip()}\n```",
    ]
    return Papers(recipe.to_yaml(), report, "\n\n".join(parts) + "\n")

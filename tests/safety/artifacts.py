"""Every kind of file that spectrim reads and a stranger may have written."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectrim.allocate import Curve, Limits, Shape
from spectrim.allocate.elastic import elastic_order
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.evaluate.points import CurvePoint
from spectrim.learn.checkpoint import Checkpoint
from spectrim.recipes import get_recipe
from spectrim.report.content import read_curve_file, read_result
from spectrim.run.survey.replanning import plan_record
from spectrim.storage.admission import admit_folder
from spectrim.storage.elastic import Base, Elastic, load_elastic, save_elastic
from spectrim.storage.folder import Papers
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.plan_file import load_plan
from spectrim.storage.survey_file import load_factors, load_survey, save_survey
from spectrim.storage.survey_record import Factors, Survey, SurveyKey
from spectrim.storage.table import parse_table
from storage_cases import compressed, save


@dataclass(frozen=True)
class Artifact:
    """One kind.

    Attributes:
        name: of the kind.
        write: make a good one in a folder that does not exist yet.
        read: what a user's command does with it, reduced to values that can be compared.
        sound: raise AssertionError where an accepted object cannot be right.
        files: names of the files that `read` looks into; empty for all.
    """

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    sound: Callable[[Any], None] = lambda found: None
    files: tuple[str, ...] = ()

    def reads(self, path: Path) -> bool:
        return not self.files or path.name in self.files


def curves():
    shapes = {"layers.0.q": (24, 16), "layers.0.k": (8, 16), "layers.1.up": (40, 16)}
    return [Curve(n, i, n, Shape(*s, i == 1)) for i, (n, s) in enumerate(shapes.items())]


def write_elastic(folder):
    rng = np.random.default_rng(0)
    importance = [(rng.random(c.rank),) for c in curves()]
    order, _ = elastic_order(curves(), importance, limits=Limits(dtype_bytes=2), adapters=1)
    factors = {
        c.name: (torch.ones(c.shape.out_features, h), torch.ones(h, c.shape.in_features))
        for c, h in zip(order.curves, order.held, strict=True)
    }
    base = Base(name="someone/base", identity="0" * 64, dtype="bfloat16", other_bytes=1000)
    elastic = Elastic(order, factors, base, "test")
    save_elastic(elastic, folder, Papers("name: t\n", {}, "# card\n"))


def read_elastic(folder):
    found = load_elastic(folder)
    plans = [found.order.plan(keep).to_json() for keep in (1.0, 0.8)]
    return [plans, found.base, found.source, list(found.factors.items())]


def write_survey(folder):
    rng = np.random.default_rng(0)
    made, factors = [], {}
    for curve in curves():
        energy = np.sort(rng.random(8))[::-1].copy()
        made.append(
            Curve(curve.name, curve.block, curve.name, curve.shape, energy, 9.0, 0.0, energy)
        )
        m, n = curve.shape.out_features, curve.shape.in_features
        factors[curve.name] = Factors(torch.ones(m, 3), torch.ones(3, n))
    key = SurveyKey(model="m", tokenizer="t", windows="w", settings={"decompose.floor": 0.5})
    losses = {"kfac": {c.name: np.linspace(1, 0, 9) for c in made}}
    facts = {"seconds": {"survey": 1.5}, "sign_stability": {"layers.0.q": 0.5}}
    survey = Survey(
        key, "some/model", tuple(made), losses, 2, 1234, {"name": "svd"}, facts,
        {("layers.0.q", 0.4): 17.5}, ("a note",), factors,
    )  # fmt: skip
    save_survey(survey, folder)


def read_survey(folder):
    survey = load_survey(folder)
    parts = [load_factors(survey, c.name) for c in survey.curves]
    numbers = [[c.name, c.energy, c.score, c.shape, c.total, c.reference] for c in survey.curves]
    return [
        survey.key, survey.facts, survey.recipe, survey.table, survey.notes, numbers,
        dict(survey.losses), [[p.up, p.down] for p in parts], survey.sign_stability,
        [survey.curves_for(score) is not None for score in survey.scores],
    ]  # fmt: skip


def sound_survey(found):
    for _, energy, _, shape, _, _ in found[5]:
        assert np.isfinite(energy).all()
        assert energy.size <= min(shape.out_features, shape.in_features)


def write_model(folder):
    save(compressed("llama"), folder, max_shard_size="60KB")
    # Only what `read_model` looks into: configuration, index and shards.
    for name in ("README.md", "recipe.yaml", "spectrim_report.json", "generation_config.json"):
        (folder / name).unlink()


def read_model(folder):
    admit_folder(folder)
    found = inspect_folder(folder)
    table = None if found.table is None else found.table.to_json()
    return [table, found.summary(), list(found.targets), dict(found.tensors)]


def sound_model(found):
    table, summary, targets, tensors = found
    assert summary["bytes"] <= sum(summary["files"].values())
    assert all(t.bytes > 0 and t.dense_bytes > 0 for t in targets)
    assert all(e.file in summary["files"] for e in tensors.values())
    assert table is None or parse_table(table, source="again").to_json() == table


def write_plan(folder):
    folder.mkdir()
    entries = (
        PlanEntry("layers.0.q", 5, "packed", 100, 400, "int8", 0.5),
        PlanEntry("layers.0.k", None, "dense", 400, 400),
    )
    record = plan_record(Plan(entries, 0.6, "knapsack", ("a note",)), "somewhere")
    (folder / "plan.json").write_text(json.dumps(record))


def sound_plan(found):
    plan, _ = found
    assert plan.achieved_keep > 0
    assert all(e.rank is None or e.rank > 0 for e in plan.entries)


REPORT = {
    "format_version": 1,
    "model": "someone/model",
    "recipe": {"name": "svd-llm", "hash": "0" * 64},
    "keep": {
        "asked": 0.6,
        "achieved": 0.5987,
        "whole_model": 0.7,
        "target_bytes": {"dense": 17280, "stored": 10368},
        "model_bytes": {"dense": 30000, "stored": 23000},
    },
    "rule": "uniform",
    "predicted_loss": 0.5,
    "targets": [
        {"name": f"model.layers.{b}.q", "shape": [40, 54], "rank": 7, "storage": "factored",
         "weights": "native", "bytes": 2000, "dense_bytes": 4320, "kept": 0.46,
         "predicted_error": 0.1, "measured_error": 0.11, "damping": 0.0}
        for b in range(2)
    ],
    "blocks": {},
    "notes": ["a note"],
    "seconds": {"compress": 2.5},
    "environment": {"torch": "2"},
    "left_alone": {"model.layers.0.router": "a router"},
    "outside_budget": {
        "words": "1 % of the block parameters", "parameters": {"blocks": 100, "model": 200},
        "in_blocks": {"router": 1}, "elsewhere": {"embeddings": 100},
    },
    "calibration": {"windows": 4, "sources": ["text"]},
    "peak_memory_bytes": 10**9,
}  # fmt: skip


def write_report(folder):
    folder.mkdir()
    (folder / "spectrim_report.json").write_text(json.dumps(REPORT))
    (folder / "recipe.yaml").write_text("name: svd-llm\n")


def write_curve(folder):
    folder.mkdir()
    point = CurvePoint(
        "svd", 0.5, 0.5, 1000, 2000, 8.0, 3.0, 20.0, 0.1, 0.05, 0.15, 0.1, 0.01, 0.8, 1.0, None
    )
    (folder / "curve.json").write_text(
        json.dumps({"format_version": 1, "points": [point.record()]})
    )


IDENTITY = {"seed": 0, "learn.batch": 4}


def write_checkpoint(folder):
    checkpoint = Checkpoint(folder, IDENTITY, 1)
    checkpoint.save({"a": torch.ones(3), "optimizer.0.step": torch.ones(1)}, {"step": 1})


def write_recipe(folder):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(get_recipe("svd-llm").to_yaml())


ARTIFACTS = (
    Artifact("model", write_model, read_model, sound_model),
    Artifact("survey", write_survey, read_survey, sound_survey),
    Artifact("elastic", write_elastic, read_elastic, files=("elastic.json", "elastic.safetensors")),
    Artifact("plan", write_plan, lambda f: list(load_plan(f / "plan.json")), sound_plan),
    Artifact("report", write_report, read_result),
    Artifact("curve", write_curve, lambda f: read_curve_file(f)),
    Artifact("checkpoint", write_checkpoint, lambda f: Checkpoint(f, IDENTITY, 1).load()),
    Artifact("recipe", write_recipe, lambda f: get_recipe(f / "recipe.yaml")),
)

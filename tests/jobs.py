"""Runs on tiny models, below the level of files: a job, a uniform plan, and a model to compare."""

import copy

import torch

from architectures import tiny, windows
from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.allocate.uniform import uniform
from spectrim.data.windows import given_windows
from spectrim.model.tracing import trace
from spectrim.recipe import Recipe
from spectrim.run.job import Job
from spectrim.run.options import RunOptions


def make_job(
    name="llama", *, count=24, length=12, dtype=torch.float64, data_seed=0, model=None, **recipe
):
    """A job on a tiny model with random windows; keyword arguments are the recipe's fields."""
    said = {k: recipe.pop(k) for k in ("offload_streams", "on_failure", "team") if k in recipe}
    model = (model or tiny(name)[0]).to(dtype)
    recipe = {"flow": "sequential", "keep": 0.5, "calibration": {"batch": 8}, **recipe}
    ids = windows(count, length, seed=data_seed)
    return Job(
        model=model,
        anatomy=trace(model, ids[:1]),
        windows=given_windows(ids),
        recipe=Recipe.model_validate({"name": "test", **recipe}),
        device=torch.device("cpu"),
        options=RunOptions(**said),
    )


def uniform_plan(job):
    curves = [
        Curve(t.name, t.block, t.projection, Shape(t.out_features, t.in_features, t.bias))
        for t in job.anatomy.targets
    ]
    return uniform(curves, keep=job.recipe.keep)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def same_state(one, other):
    """Whether two modules hold the same bytes under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copied(model):
    return copy.deepcopy(model)

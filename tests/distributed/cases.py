"""What is computed by one process and by two, and must come out the same."""

from __future__ import annotations

import torch

from architectures import tiny, windows
from jobs import logits, make_job
from spectrim.layers.swap import compressed_layers
from spectrim.run.cutting_all import choose, cut_targets
from spectrim.run.store.storing import store
from spectrim.run.survey.survey import make_survey
from spectrim.run.train.whole_network import carry_out, prepare

BLOCK = {"step": "block", "epochs": 3, "batch": 8, "look_ahead": 1, "learning_rate": 1e-3}

# An odd number of windows, so that the parts differ; batches that do not divide them.
CUTS = {
    "one-shot plain": {"flow": "one-shot", "decompose": {"objective": "plain"}},
    "one-shot whitened": {"flow": "one-shot"},
    "one-shot fisher": {"flow": "one-shot", "decompose": {"objective": "fisher"}},
    "one-shot kfac": {"flow": "one-shot", "decompose": {"objective": "kfac"}},
    "sequential anchored": {"decompose": {"objective": "anchored"}},
    "sequential anchored_kfac": {"decompose": {"objective": "anchored_kfac"}},
    "closed form": {"refine": [{"step": "closed_form"}]},
    "block": {"decompose": {"objective": "anchored"}, "refine": [BLOCK]},
    "corrections": {
        "flow": "one-shot",
        "allocate": {"rule": "zero_sum", "score": "first_order", "gradient_windows": 5},
        "refine": [{"step": "projected_gradient", "stages": 2, "windows": 3}],
    },
    "packed": {"flow": "one-shot", "storage": {"kind": "packed"}},
    "int8": {"flow": "one-shot", "storage": {"weights": "int8"}},
    "measured table": {
        "flow": "one-shot",
        "decompose": {"objective": "activation"},
        "allocate": {"rule": "sensitivity", "score": "measured"},
    },
    "distill": {
        "flow": "one-shot",
        "refine": [{"step": "distill", "steps": 4, "batch": 5, "evaluate_every": 2, "windows": 6}],
    },
}
SURVEYS = {
    "scores": ("whitened", ("first_order", "second_order", "kfac", "measured")),
    "kfac": ("kfac", ("kfac",)),
}
SINGLE = ("one-shot whitened", "sequential anchored")
"""Also in fp32, where forwards round differently in batches of another size."""


def job_of(**fields):
    """Two blocks show what three do: a first one, and one after what another has left."""
    model = tiny("llama")[0]
    return make_job(count=11, model=model, calibration={"batch": 4}, **fields)


def cut(case, *, dtype=torch.float64, **job_fields):
    """Every compressed layer as one matrix, the logits of fresh windows, and the ranks."""
    job = job_of(dtype=dtype, **CUTS[case], **job_fields)
    choice = choose(job)
    steps = prepare(job)
    plan = cut_targets(job, choice)
    carry_out(job, steps)
    plan = store(job, plan, dtype)
    found = {name: x.dense_weight().detach() for name, x in compressed_layers(job.model).items()}
    found["logits"] = logits(job.model, windows(3, seed=9))
    ranks = [-1 if e.rank is None else e.rank for e in plan.entries]
    found["ranks"] = torch.tensor(ranks)
    facts = job.log.targets
    found["errors"] = torch.tensor([facts[e.name]["predicted_error"] for e in plan.entries])
    return {name: t.double().contiguous() for name, t in found.items()}


def survey(case, **job_fields):
    """All numbers of a survey; products of the factors, which have no signs of their own."""
    objective, scores = SURVEYS[case]
    job = job_of(
        flow="one-shot",
        decompose={"objective": objective},
        allocate={"gradient_windows": 7},
        **job_fields,
    )
    made = make_survey(job, scores=scores)
    found = {}
    for curve in made.curves:
        factors = made.factors[curve.name]
        found[f"{curve.name} product"] = factors.up @ factors.down
        found[f"{curve.name} energy"] = torch.from_numpy(curve.energy.copy())
        if curve.score is not None:
            found[f"{curve.name} score"] = torch.from_numpy(curve.score.copy())
        if curve.reference is not None:
            found[f"{curve.name} reference"] = torch.tensor(curve.reference)
    for score, by_name in made.losses.items():
        found |= {f"{n} {score}": torch.from_numpy(x.copy()) for n, x in by_name.items()}
    return {name: t.double().contiguous() for name, t in found.items()}


def everything(**job_fields):
    """Case -> tensors by name, for all cases."""
    found = {case: cut(case, **job_fields) for case in CUTS}
    found |= {f"{c} in fp32": cut(c, dtype=torch.float32, **job_fields) for c in SINGLE}
    return found | {f"survey {case}": survey(case, **job_fields) for case in SURVEYS}

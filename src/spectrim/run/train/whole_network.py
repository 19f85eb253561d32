"""Refinement steps that train all blocks together, after the cut, in the recipe's order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from spectrim.errors import NonFiniteError
from spectrim.recipe import DistillRefinement, LoraRefinement
from spectrim.refine.lora import require_peft
from spectrim.run.job import Job
from spectrim.run.train.distilling import distill_network, record_teacher
from spectrim.run.train.recovering import recover_network

Step = tuple[str, int, Callable[[], object]]
"""Name, number of judgements, and what to do."""


def prepare(job: Job) -> list[Step]:
    """What the recipe asks for after the cut; records what only the original network can give.

    Raises:
        MissingExtraError: a step needs a package that is not installed.
        InputError: too few windows for a step's held-out share.
    """
    steps: list[Step] = []
    for step in job.recipe.refine:
        if isinstance(step, DistillRefinement):
            with job.log.timed("teacher"):
                teacher = record_teacher(job, step)
            judgements = -(-step.steps // step.evaluate_every)
            steps.append((step.step, judgements, partial(distill_network, job, step, teacher)))
        elif isinstance(step, LoraRefinement):
            require_peft()
            judgements = step.epochs * len(step.order)
            steps.append((step.step, judgements, partial(recover_network, job, step)))
    return steps


def carry_out(job: Job, steps: list[Step]) -> None:
    """Train, step by step.

    Raises:
        NonFiniteError: a training diverged and `on_failure` is not `keep-unrefined`.
    """
    while steps:
        # A step is forgotten once it is done, and its streams with it.
        name, judgements, act = steps.pop(0)
        job.progress.start(name, judgements)
        try:
            with job.log.timed(name):
                act()
        except NonFiniteError as error:
            if job.options.on_failure != "keep-unrefined":
                raise
            job.log.notes.append(f"{error} The network was kept as it was, as asked.")
        job.progress.finish(name)

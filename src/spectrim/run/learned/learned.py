"""The flow `learned`: gates or scores on every component, then a cut or an elastic artifact."""

from __future__ import annotations

import logging
from pathlib import Path

from spectrim.allocate.plan import Plan
from spectrim.errors import RecipeError
from spectrim.recipe import AcipLearning, SocoLearning
from spectrim.run.job import Job
from spectrim.run.learned.every_size import learn_every_size
from spectrim.run.learned.one_size import learn_one_size
from spectrim.run.learned.predicting import learning_steps
from spectrim.storage.elastic import Base, Elastic

logger = logging.getLogger(__name__)


def learn(
    job: Job, *, base: Base | None = None, work: Path | None = None
) -> tuple[Plan, Elastic | None]:
    """Train on the recipe's `learn` section and cut the model at the recipe's keep, in place.

    Args:
        job: the run.
        base: names the original checkpoint; with it, ACIP returns an elastic artifact.
        work: folder for checkpoints; a run that finds one there goes on from it.

    Returns:
        The plan that was carried out, and ACIP's artifact.

    Raises:
        RecipeError: the recipe has no `learn` section.
        InputError: the work folder belongs to another run; names the differences.
        NonFiniteError: the training diverged; the last checkpoint stays.
        BudgetError: the keep lies below what the training reaches.
    """
    section = job.recipe.learn
    if section is not None:
        steps = sum(learning_steps(section).values())
        logger.info(
            "%s trains for at most %d steps; `--dry-run` says how long that takes here",
            *(section.method, steps),
        )
    if isinstance(section, AcipLearning):
        return learn_every_size(job, section, base, work)
    if isinstance(section, SocoLearning):
        return learn_one_size(job, section, base, work), None
    raise RecipeError(f"recipe {job.recipe.name!r} has the flow 'learned' but no `learn` section")

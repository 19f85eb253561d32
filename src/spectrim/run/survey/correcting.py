"""Predicted losses held against measured ones, target by target, before ranks are planned again.

A quadratic prediction is off by another factor for every target: what is fed by uneven channels, or
decides where a token looks, costs more than its curvature says. So every target is cut alone to the
rank that the first plan gives it, the network is run from its block on over a few windows, and its
curve of predicted losses is multiplied by `measured / predicted`. A target that the first plan
leaves dense gets the median factor of its projection in the other blocks.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from spectrim.allocate.curve import loss_by_rank
from spectrim.allocate.plan import Plan
from spectrim.run.job import Job
from spectrim.run.survey.probing import measured_divergences
from spectrim.storage.survey_record import Survey

MOST = 30.0
"""No prediction is corrected by more than this factor, up or down: beyond it the measurement says
that the curve is wrong, not by how much."""


def corrected_survey(job: Job, survey: Survey, plan: Plan) -> Survey:
    """The survey with its losses corrected at a plan's ranks; the log gets what was found.

    Args:
        job: the run; its rule says which score is corrected, on how many windows.
        survey: of the untouched model, with factors.
        plan: ranks at which the curves are held against the network.

    Raises:
        NonFiniteError: the original model's output or the cut one's is not finite.
    """
    rule = job.recipe.allocate
    known = survey.curves_for(rule.score)
    assert survey.factors is not None
    ids = job.ids[: rule.probe_windows]
    predicted = {e.name: e.loss for e in plan.entries if e.rank is not None and e.loss}
    ranks = {e.name: e.rank for e in plan.entries if e.rank is not None and e.name in predicted}
    with job.log.timed("correction"):
        measured = measured_divergences(job, ids, survey.factors, ranks)
    factors = {
        name: min(max(measured[name] / loss, 1 / MOST), MOST) for name, loss in predicted.items()
    }
    for name, loss in predicted.items():
        job.log.target(
            name, predicted_loss=loss, measured_loss=measured[name], probed_at=ranks[name]
        )
    projections = {c.name: c.projection for c in known}
    types: dict[str, list[float]] = {}
    for name, factor in factors.items():
        types.setdefault(projections[name], []).append(factor)
    for name, projection in projections.items():
        factors.setdefault(name, median(types.get(projection, [1.0])))
    job.log.notes.append(
        f"losses of {len(predicted)} targets cut one at a time, measured on {len(ids)} windows: "
        f"{sum(measured.values()):.4g} nats in all, predicted {sum(predicted.values()):.4g}; "
        f"corrections {min(factors.values()):.2g} to {max(factors.values()):.2g}"
    )
    losses = {c.name: factors[c.name] * loss_by_rank(c, rule.score) for c in known}
    return replace(survey, losses={**survey.losses, rule.score: losses})

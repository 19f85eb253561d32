"""Scores of a survey's components: what one backward pass predicts, and what a few runs measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from spectrim.allocate.curve import Curve
from spectrim.moments.moments import OutputMoments
from spectrim.recipe import Decompose
from spectrim.run.job import Job
from spectrim.run.survey.backward import backward_pass
from spectrim.run.survey.pieces import Found, note_loss
from spectrim.run.survey.probing import measured_divergences
from spectrim.storage.survey_record import Factors

REFERENCE_SHARE = 0.1
"""Measured KL is taken at this share of a target's break-even rank."""

MEASURED_WINDOWS = 8
"""Windows behind measured KL."""


def score_components(
    job: Job, choice: Decompose, found: Found, factors: Mapping[str, Factors]
) -> None:
    """One backward pass over some windows gives the scores of all components of all targets.

    Args:
        job: the run.
        choice: objective and clipping.
        found: the survey so far; its curves and losses are completed.
        factors: all components of every target.
    """
    windows = min(job.recipe.allocate.gradient_windows, job.ids.shape[0])
    weigh = "kfac" in found.wanted and choice.objective != "kfac"
    places = {curve.name: i for i, curve in enumerate(found.curves)}

    def components(name: str) -> tuple[Tensor, Tensor]:
        held = factors[name]
        return held.up, held.down

    blocks = backward_pass(
        job,
        choice,
        needs=frozenset({"G"} if weigh else ()),
        ids=job.ids[:windows],
        factors=components,
    )
    for _, result in blocks:
        tokens = result.tokens / windows
        for name, scores in result.scores.items():
            found.stability[name] = scores.sign_stability
            if "first_order" in found.wanted:
                i = places[name]
                found.curves[i] = replace(found.curves[i], score=scores.first.cpu().numpy())
            if "second_order" in found.wanted:
                # Windows' gradients are sums over their tokens: the mean loss's curvature is
                # E[s sᵀ] / tokens, and the scores' squares are per token squared.
                note_loss(found, "second_order", name, 0.5 * tokens * scores.squares)
            if weigh:
                gain = _gain(result.outputs[name], factors[name].up)
                note_loss(found, "kfac", name, 0.5 * gain * found.spread[name].to(gain))
        del result  # before the next block's sums are gathered
    _note_stability(found, windows)


def _gain(output: OutputMoments, up: Tensor) -> Tensor:
    """`u_iᵀ G u_i` per token of every component, (r,) fp64."""
    assert output.G is not None
    up = up.double().to(output.G.device)
    return ((output.G / output.tokens) @ up * up).sum(0)


def _note_stability(found: Found, windows: int) -> None:
    agreeing = float(np.mean(list(found.stability.values())))
    found.notes.append(
        f"signs of first-order scores agree between the halves of {windows} windows for "
        f"{agreeing:.0%} of the components (half is noise)"
    )


def with_references(job: Job, found: Found) -> list[Curve]:
    """The curves with one measured KL each."""
    ranks = {
        c.name: max(1, round(REFERENCE_SHARE * found.factors[c.name].rank)) for c in found.curves
    }
    ids = job.ids[: min(MEASURED_WINDOWS, job.ids.shape[0])]
    divergences = measured_divergences(job, ids, found.factors, ranks)
    found.notes.append(f"KL measured on {len(ids)} windows, {len(ranks)} targets one at a time")
    return [replace(c, reference=(ranks[c.name], divergences[c.name])) for c in found.curves]

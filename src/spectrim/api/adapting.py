"""The difference of two models as a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.arguments import check_path, check_whole, refuse_unused
from spectrim.errors import InputError
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE, get_recipe
from spectrim.run.adapting import Adapter, make_adapter
from spectrim.run.job import Progress
from spectrim.run.loading import load_model
from spectrim.run.places import places
from spectrim.run.resolving import check_brought, resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.survey.survey import surveyed_choice
from spectrim.run.texts import UserText, own_text
from spectrim.shortage import tells_of_shortage
from spectrim.storage.adapter import save_adapter

__all__ = ["adapter"]

METRICS = ("kfac", "whitened", "plain")


@tells_of_shortage
def adapter(
    base: str | Path | nn.Module,
    model: str | Path | nn.Module,
    *,
    rank: int = 16,
    output: str | Path | None = None,
    overwrite: bool = False,
    text: UserText = None,
    metric: str | None = None,
    allow_differences: bool = False,
    windows: int | None = None,
    window_length: int | None = None,
    batch: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Adapter:
    """The best rank-r difference between two models, as a LoRA folder for `base`.

    Model objects are changed: compressed layers are multiplied out, and the base gets the adapter.

    Args:
        base: the model that the adapter is for: rounded, compressed by spectrim, or the one that
            `model` was tuned from.
        model: the model to reach.
        rank: r, of every layer.
        output: folder to write; it must not exist or be empty.
        overwrite: replace an existing output folder.
        text: whose moments are the metric; None for the plain SVD of the differences.
        metric: `kfac` (predicted loss, by default with a text), `whitened` (outputs on the text)
            or `plain` (weights, by default without one).
        allow_differences: leave norms, embeddings and all else that a LoRA does not hold as they
            are in `base`.
        windows: number of calibration windows.
        window_length: tokens per window.
        batch: windows per pass; None follows the machine's memory.
        seed: of the windows.
        device: `auto`, or a torch device.
        dtype: to work in.
        tokenizer: for model objects.
        progress: told of stages and steps.
        trust_remote_code: run code that comes with a checkpoint.

    Raises:
        SpectrimError: every refusal; nothing is left half-written.
    """
    recipe = _recipe(metric, text)
    check_whole(rank=rank)
    check_path(output=output)
    check_brought(base)
    check_brought(model)
    asked: dict[str, Any] = {
        "windows": windows,
        "window_length": window_length,
        "batch": batch,
        "seed": seed,
    }
    if text is None:
        refuse_unused("without a text nothing is calibrated", asked)
    recipe = resolve_recipe(recipe, text=text, **asked)
    given = own_text(text)
    read = sources_of(model=[base, model], text=text)
    with places(output, overwrite=overwrite, resume=False, sources=read):
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        }
        of = load_model(base, **options)
        to = load_model(model, tokenizer=tokenizer, **options)
        made = make_adapter(
            of,
            to,
            recipe,
            rank=rank,
            text=given,
            allow_differences=allow_differences,
            progress=progress,
        )
        if output is not None:
            save_adapter(
                made.factors,
                output,
                rank=rank,
                transposed=made.transposed,
                base=of.name,
                dtype=to.stored_dtype,
                record=made.facts,
                overwrite=overwrite,
            )
    return made


def _recipe(metric: str | None, text: UserText) -> Recipe:
    """The default recipe's double-sided objective, or a simpler one."""
    chosen = ("plain" if text is None else "kfac") if metric is None else metric
    if chosen not in METRICS:
        raise InputError(f"metric is {metric!r}; use one of {', '.join(METRICS)}")
    if (chosen == "plain") != (text is None):
        raise InputError(
            f"the metric {chosen} "
            + ("reads no text; leave the text out" if text is not None else "needs a text")
        )
    default = get_recipe(DEFAULT_RECIPE)
    unshifted = surveyed_choice(default.decompose).model_copy(update={"objective": chosen})
    return default.with_changes(
        name="adapter", flow="one-shot", decompose=unshifted.model_dump(), refine=[]
    )

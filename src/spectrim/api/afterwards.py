"""What is done with a result afterwards: an adapter that repairs it, further training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.arguments import check_path, check_whole, refuse_unused
from spectrim.errors import InputError
from spectrim.recipe import Calibration, Recipe
from spectrim.recipes import DEFAULT_RECIPE, get_recipe
from spectrim.run.adapting import Adapter, make_adapter
from spectrim.run.healing import Healed, Healing, heal_model
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.run.places import places
from spectrim.run.progress import Progress, Silent
from spectrim.run.resolving import check_brought, resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.store.saving import save_healed
from spectrim.run.survey.survey import surveyed_choice
from spectrim.run.texts import UserText, own_text
from spectrim.shortage import tells_of_shortage
from spectrim.storage.adapter import save_adapter

__all__ = ["adapter", "heal"]

METRICS = ("kfac", "whitened", "plain")

WINDOWS = 256
LENGTH = 512
"""Tokens of a window to train on."""


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
    options = RunOptions(
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        resume=False,
        progress=progress or Silent(),
        exactly=window_length is not None,
    )
    with places(output, options, sources=read):
        of = load_model(base, options)
        to = load_model(model, replace(options, tokenizer=tokenizer))
        made = make_adapter(
            of,
            to,
            recipe,
            options,
            rank=rank,
            text=given,
            allow_differences=allow_differences,
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


@tells_of_shortage
def heal(
    artifact: str | Path,
    *,
    text: UserText,
    output: str | Path | None = None,
    overwrite: bool = False,
    parts: str = "factors",
    teacher: str | Path | None = None,
    steps: int | None = None,
    batch: int | None = None,
    rank: int | None = None,
    learning_rate: float | None = None,
    windows: int = WINDOWS,
    window_length: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Healed:
    """Train what compression left of a model, and keep the state that held-out windows like best.

    The layers keep their ranks, storage and bytes. Nothing is kept of a training that does not
    help: the untrained state is one of those that are judged.

    Args:
        artifact: folder of a result in native numbers.
        text: to train on, as for `compress`.
        output: folder to write; it must not exist or be empty.
        overwrite: replace an existing output folder.
        parts: `factors` trains all numbers of the compressed layers, `lora` low-rank updates of
            one part after the other, which takes less memory and moves less.
        teacher: the original; its next-token distribution is then the aim instead of the text.
        steps: at most, of each stage.
        batch: windows per step.
        rank: of the updates, for `lora`.
        learning_rate: peak; for `factors` a share of each tensor's size.
        windows: number of windows; an eighth of them chooses the step.
        window_length: tokens per window, by default 512 or what the model allows.
        seed: of windows and order.
        device: `auto`, or a torch device.
        dtype: to work in.
        progress: told of every judgement.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        SpectrimError: every refusal; nothing is left half-written.
    """
    check_path(artifact=artifact, output=output, teacher=teacher)
    check_whole(steps=steps, batch=batch, rank=rank)
    check_whole(windows=windows, least=2)
    check_whole(window_length=window_length, least=2)
    check_whole(seed=seed, least=0, most=2**63 - 1)
    if parts not in ("factors", "lora"):
        raise InputError(f"parts is {parts!r}; use factors or lora")
    if rank is not None and parts != "lora":
        raise InputError("rank is that of the updates of parts='lora'; leave it out")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise InputError(f"learning_rate is {learning_rate}; expected a positive number")
    if text is None:
        raise InputError("text is None; healing needs a text to train on")
    check_brought(artifact)
    asked = {"steps": steps, "batch": batch, "rank": rank, "learning_rate": learning_rate}
    chosen = {name: value for name, value in asked.items() if value is not None}
    healing = Healing(parts=parts, seed=seed, **chosen)  # type: ignore[arg-type]
    given = own_text(text)
    calibration = Calibration(
        text=str(text) if isinstance(text, str | Path) else "self",
        windows=windows,
        window_length=window_length or LENGTH,
    )
    read = sources_of(result=artifact, model=teacher or (), text=text)
    options = RunOptions(
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        resume=False,
        progress=progress or Silent(),
        exactly=window_length is not None,
    )
    with places(output, options, sources=read):
        loaded = load_model(artifact, options)
        healed = heal_model(
            loaded,
            calibration,
            healing,
            options,
            text=given,
            teacher=None if teacher is None else load_model(teacher, options),
        )
        if output is not None:
            save_healed(healed, artifact, output, overwrite=overwrite)
            healed.output = Path(output)
    return healed


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

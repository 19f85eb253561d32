"""What is done with a result afterwards: an adapter that repairs it, further training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from spectrim.arguments import check_path, check_whole, refuse_unused
from spectrim.errors import InputError
from spectrim.recipe import Calibration, Recipe
from spectrim.recipes import DEFAULT_RECIPE, get_recipe
from spectrim.run.adapting import Adapter, make_adapter
from spectrim.run.finding import check_brought
from spectrim.run.healing import Healed, Healing, heal_model
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.run.places import places
from spectrim.run.reading_words import AdapterWords, HealWords
from spectrim.run.resolving import resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.store.saving import save_healed
from spectrim.run.survey.survey import surveyed_choice
from spectrim.run.texts import UserText, own_text
from spectrim.run.word import takes
from spectrim.shortage import tells_of_shortage
from spectrim.storage.adapter import save_adapter

if TYPE_CHECKING:
    from typing_extensions import Unpack

METRICS = ("kfac", "whitened", "plain")

WINDOWS = 256
LENGTH = 512
"""Tokens of a window to train on."""


@tells_of_shortage
@takes(AdapterWords)
def adapter(
    base: str | Path | nn.Module, model: str | Path | nn.Module, **words: Unpack[AdapterWords]
) -> Adapter:
    """The best rank-r difference between two models, as a LoRA folder for `base`.

    Model objects are changed: compressed layers are multiplied out, and the base gets the adapter.

    Args:
        base: the model that the adapter is for: rounded, compressed by spectrim, or the one that
            `model` was tuned from.
        model: the model to reach.
        **words: those below; a text is what the metric comes from.

    Raises:
        SpectrimError: every refusal; nothing is left half-written.
    """
    asked: dict[str, Any] = dict(words)
    text, output, rank = asked["text"], asked["output"], asked["rank"]
    recipe = _recipe(asked["metric"], text)
    check_whole(rank=rank)
    check_path(output=output)
    check_brought(base)
    check_brought(model)
    calibration = {n: asked[n] for n in ("windows", "window_length", "batch", "seed")}
    if text is None:
        refuse_unused("without a text nothing is calibrated", calibration)
    recipe = resolve_recipe(recipe, text=text, **calibration)
    given = own_text(text)
    read = sources_of(model=[base, model], text=text)
    options = replace(RunOptions.among(asked), resume=False)
    with places(output, options, sources=read):
        of = load_model(base, replace(options, tokenizer=None))
        to = load_model(model, options)
        made = make_adapter(
            of,
            to,
            recipe,
            options,
            rank=rank,
            text=given,
            allow_differences=asked["allow_differences"],
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
                overwrite=options.overwrite,
            )
    return made


@tells_of_shortage
@takes(HealWords)
def heal(artifact: str | Path, **words: Unpack[HealWords]) -> Healed:
    """Train what compression left of a model, and keep the state that held-out windows like best.

    The layers keep their ranks, storage and bytes. Nothing is kept of a training that does not
    help: the untrained state is one of those that are judged. `factors` trains all numbers of the
    compressed layers, `lora` low-rank updates of one part after the other, which takes less memory
    and moves less.

    Args:
        artifact: folder of a result in native numbers.
        **words: those below.

    Raises:
        SpectrimError: every refusal; nothing is left half-written.
    """
    asked: dict[str, Any] = dict(words)
    text, output, teacher, parts = (asked[n] for n in ("text", "output", "teacher", "parts"))
    windows, window_length = asked["windows"], asked["window_length"]
    rate, seed = asked["learning_rate"], asked["seed"]
    check_path(artifact=artifact, output=output, teacher=teacher)
    check_whole(**{name: asked[name] for name in ("steps", "batch", "rank")})
    check_whole(windows=windows, least=2)
    check_whole(window_length=window_length, least=2)
    check_whole(seed=seed, least=0, most=2**63 - 1)
    if parts not in ("factors", "lora"):
        raise InputError(f"parts is {parts!r}; use factors or lora")
    if asked["rank"] is not None and parts != "lora":
        raise InputError("rank is that of the updates of parts='lora'; leave it out")
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"learning_rate is {rate}; expected a positive number")
    if text is None:
        raise InputError("text is None; healing needs a text to train on")
    check_brought(artifact)
    trained = {name: asked[name] for name in ("steps", "batch", "rank", "learning_rate")}
    chosen = {name: value for name, value in trained.items() if value is not None}
    healing = Healing(parts=parts, seed=seed, **chosen)  # type: ignore[arg-type]
    given = own_text(text)
    calibration = Calibration(
        text=str(text) if isinstance(text, str | Path) else "self",
        windows=windows,
        window_length=window_length or LENGTH,
    )
    read = sources_of(result=artifact, model=teacher or (), text=text)
    options = replace(RunOptions.among(asked), resume=False)
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
            save_healed(healed, artifact, output, overwrite=options.overwrite)
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

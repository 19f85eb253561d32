"""The Python interface; the command line says the same with the same words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.allocate.budget import parse_size
from spectrim.allocate.plan import Plan
from spectrim.api.afterwards import adapter, heal
from spectrim.api.costing import compress_at_cost
from spectrim.api.reading import evaluate, export, inspect, plan
from spectrim.arguments import check_fraction, check_path, refuse_unused
from spectrim.distributed.team import Team
from spectrim.errors import BudgetError, InputError
from spectrim.measure.running import gives_every_size
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE
from spectrim.run.compress import Outcome, run_recipe
from spectrim.run.job import Progress
from spectrim.run.learned.elastic import ElasticModel
from spectrim.run.learned.elastic import open_elastic as load_elastic
from spectrim.run.learned.resizing import settle_outcome
from spectrim.run.learned.saving_elastic import save_survey_as_elastic as elastic
from spectrim.run.loading import load_model
from spectrim.run.memory import goes_out_of_core
from spectrim.run.out_of_core import check_out_of_core, check_survey_out_of_core
from spectrim.run.places import places
from spectrim.run.predicting import estimate
from spectrim.run.resolving import check_brought, check_size, resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.store.saving import save_outcome
from spectrim.run.survey.replanning import bring_plan
from spectrim.run.survey.surveying import resize_survey, survey_model
from spectrim.run.texts import UserText, own_text
from spectrim.shortage import tells_of_shortage
from spectrim.storage.atomic import check_output
from spectrim.storage.survey_file import is_survey, load_survey, save_survey
from spectrim.storage.survey_record import Survey

__all__ = [
    "ElasticModel",
    "Result",
    "adapter",
    "compress",
    "elastic",
    "estimate",
    "evaluate",
    "export",
    "heal",
    "inspect",
    "load_elastic",
    "plan",
    "resize",
    "survey",
]


@dataclass
class Result(Outcome):
    """A compressed model, its plan, recipe and report, and the folder it was saved to."""

    output: Path | None = None


@tells_of_shortage
def compress(
    model: str | Path | nn.Module,
    *,
    keep: float | None = None,
    size: str | int | None = None,
    max_loss: float | None = None,
    energy: float | None = None,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    text: UserText = None,
    windows: int | None = None,
    window_length: int | None = None,
    batch: int | None = None,
    bos: str | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    measure: bool = True,
    evaluation_text: UserText = None,
    plan: Plan | str | Path | None = None,
    survey: Survey | str | Path | None = None,
    multiple: int | None = None,
    storage: str | None = None,
    weights: str | None = None,
    effort: str | None = None,
    tokenizer: Any = None,
    offload_streams: str | Path | None = None,
    on_failure: str = "error",
    work: str | Path | None = None,
    resume: bool = True,
    out_of_core: bool | None = None,
    self_contained: bool = False,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    team: Team | None = None,
) -> Result:
    """Compress a model and, with `output`, save it as an ordinary Hugging Face folder.

    Args:
        model: a hub name, a folder, or a loaded causal language model, which is changed in place.
        keep: fraction of the bytes of the target linear layers that remains, in (0, 1].
        size: instead of keep, the size of the whole checkpoint: bytes or "3.5GB".
        max_loss: instead of keep, nats per token that may be lost: as small as possible at that.
        energy: instead of keep, share of its objective that every target keeps.
        recipe: a preset's name, a YAML file, or a `Recipe`.
        only: patterns on target names; the others are protected and no targets any more.
        skip: patterns of targets to protect.
        text: calibration: names and files ("a.txt:0.7,b.jsonl:0.3"), documents, or windows (N, T).
        windows: number of calibration windows; None follows the model and the machine.
        window_length: tokens per window.
        batch: windows per pass; None follows the machine's memory.
        bos: BOS at the start of `none`, `each` or `half` of the windows; None for the recipe's.
        seed: of everything random in the run.
        device: `auto`, or a torch device.
        dtype: to work in; `auto` is fp32 on a CPU. Stored is the checkpoint's dtype.
        output: folder to write; it must not exist or be empty.
        overwrite: replace an existing output folder.
        measure: perplexity before and after, see `run.quality`; about a tenth of the time.
        evaluation_text: another text to measure on as well.
        plan: ranks in place of the recipe's rule: a `Plan`, or what `spectrim plan` wrote.
        survey: of this model: gives the ranks and, to a one-shot flow, the decompositions.
        multiple: ranks are multiples of this.
        storage: `factored`, `packed` or `auto`.
        weights: a number format of `spectrim.formats`, or `auto`.
        effort: `fast`, `balanced` (trains blocks) or `thorough` (and distills), of the default.
        tokenizer: for model objects.
        offload_streams: folder for hidden states that should not be held in memory.
        on_failure: `error`, or `keep-unrefined` to keep a block whose refinement diverged.
        work: folder for what is finished, for the next run; `OUT.work` by default, then removed.
        resume: False keeps no work but in a `work` folder: a run that ends begins anew.
        out_of_core: leave blocks in the checkpoint; None decides by the memory that is free.
        self_contained: include the base checkpoint in an elastic artifact.
        progress: told of stages and steps.
        trust_remote_code: run code that comes with the checkpoint.
        team: processes that share the run (`distributed.launch`); all call this alike.

    Raises:
        SpectrimError: every refusal; nothing is left half-written.
    """
    if max_loss is not None or energy is not None:
        return compress_at_cost(compress, survey_of, dict(locals()))
    team = team or Team()
    check_path(output=output, work=work, offload_streams=offload_streams)
    check_brought(model, plan=plan, survey=survey)
    check_size(plan, keep, size)
    if on_failure not in ("error", "keep-unrefined"):
        raise InputError(f"on_failure is {on_failure!r}; use error or keep-unrefined")
    resolved = resolve_recipe(
        recipe,
        keep=keep,
        seed=seed,
        text=text,
        windows=windows,
        window_length=window_length,
        batch=batch,
        bos=bos,
        only=only,
        skip=skip,
        multiple=multiple,
        storage=storage,
        weights=weights,
        effort=effort,
    )
    if plan is not None:
        refuse_unused("the plan says how it is stored", {"storage": storage, "weights": weights})
    given = own_text(text)
    if output is None or not gives_every_size(resolved):
        refuse_unused("no elastic artifact is written", {"self_contained": self_contained})
    with places(
        output,
        overwrite=overwrite,
        work=work,
        resume=resume,
        streams=offload_streams,
        sources=sources_of(model=model, survey=survey, plan=plan, text=text),
        team=team,
    ) as folder:
        loaded = load_model(
            model,
            device=team.device or device,
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            out_of_core=goes_out_of_core(
                model,
                out_of_core,
                check=partial(
                    check_out_of_core,
                    resolved,
                    planned=plan is not None,
                    own_text=given is not None,
                ),
                device=team.device or device,
                dtype=dtype,
                kept=folder is not None and output is not None,
                team=team,
                trust_remote_code=trust_remote_code,
            ),
            whole=True,
        )
        chosen, surveyed = bring_plan(plan, loaded)
        if chosen is not None:
            resolved = resolved.with_changes(keep=chosen.keep)
        if survey is not None:
            surveyed = survey if isinstance(survey, Survey) else load_survey(survey)
        outcome = run_recipe(
            loaded,
            resolved,
            text=given,
            size=None if size is None else parse_size(size),
            plan=chosen,
            survey=surveyed,
            progress=progress,
            offload_streams=None if offload_streams is None else Path(offload_streams),
            on_failure=on_failure,
            work=folder,
            team=team,
            exactly=window_length is not None,
            measure=measure,
            evaluation_text=evaluation_text,
        )
        result = Result(**vars(outcome))
        if output is not None:
            if team.leads:
                base = loaded.name if self_contained else None
                save_outcome(result, output, overwrite=overwrite, original=base)
            team.barrier()  # what the others return is there as well
            result.output = Path(output)
    return result


@tells_of_shortage
def survey(
    model: str | Path | nn.Module,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    text: UserText = None,
    windows: int | None = None,
    window_length: int | None = None,
    batch: int | None = None,
    bos: str | None = None,
    scores: Collection[str] | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    offload_streams: str | Path | None = None,
    out_of_core: bool | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    team: Team | None = None,
) -> Survey:
    """Measure a model once, for any number of plans; the model stays as it is.

    Args:
        model: a hub name, a folder, or a loaded causal language model.
        output: folder to write the survey to.
        overwrite: replace an existing survey there.
        recipe: says objective, calibration and the rule that plans use by default.
        only: as for `compress`.
        skip: as for `compress`.
        text: calibration text, as for `compress`.
        windows: number of calibration windows; None follows the model and the machine.
        window_length: tokens per window.
        batch: windows per pass; None follows the machine's memory.
        bos: as for `compress`.
        scores: any of `first_order`, `second_order`, `kfac`, `measured`, `table` (sensitivities).
        seed: of everything random.
        device: `auto`, or a torch device.
        dtype: to work in.
        tokenizer: for model objects.
        offload_streams: folder for hidden states that should not be held in memory.
        out_of_core: as for `compress`; what is returned then has its factors in `output`.
        progress: told of stages and steps.
        trust_remote_code: run code that comes with the checkpoint.
        team: processes that share the work, as for `compress`; refusals are its as well.
    """
    team = team or Team()
    resolved = resolve_recipe(
        recipe,
        seed=seed,
        text=text,
        windows=windows,
        window_length=window_length,
        batch=batch,
        bos=bos,
        only=only,
        skip=skip,
    )
    check_path(output=output, offload_streams=offload_streams)
    check_brought(model)
    given = own_text(text)
    with places(
        output,
        overwrite=overwrite,
        streams=offload_streams,
        sources=sources_of(model=model, text=text),
        team=team,
    ) as folder:
        lazily = goes_out_of_core(
            model,
            out_of_core,
            check=partial(check_survey_out_of_core, resolved, scores, own_text=given is not None),
            device=team.device or device,
            dtype=dtype,
            kept=output is not None,
            team=team,
            trust_remote_code=trust_remote_code,
        )
        made = survey_model(
            load_model(
                model,
                device=team.device or device,
                dtype=dtype,
                tokenizer=tokenizer,
                trust_remote_code=trust_remote_code,
                out_of_core=lazily,
                whole=True,
            ),
            resolved,
            text=given,
            scores=scores,
            progress=progress,
            offload_streams=None if offload_streams is None else Path(offload_streams),
            work=folder,
            team=team,
            exactly=window_length is not None,
        )
        if output is not None:
            if team.leads:
                save_survey(made, output, overwrite=overwrite)
            team.barrier()
        if lazily:
            assert output is not None  # there is one: pieces in the work folder are about to go
            made = replace(made, factors=None, folder=Path(output))
    return made


@tells_of_shortage
def resize(
    artifact: str | Path,
    *,
    output: str | Path | None = None,
    keep: float | None = None,
    size: str | int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Another size from an elastic artifact or a survey, in seconds and without data.

    Args:
        artifact: the folder.
        output: where to write an ordinary Hugging Face folder.
        keep: fraction of the target bytes.
        size: instead of keep, of the whole checkpoint: bytes or "2.1GB".
        overwrite: replace an existing output folder.
        options: of `load_elastic`. A survey is cut by its recipe's rule, or by the given score.

    Raises:
        InputError: below the smallest size, a damaged artifact, or another base model.
    """
    check_path(artifact=artifact, output=output)
    check_fraction(keep=keep)
    if (keep is None) == (size is None):
        raise BudgetError("give either a keep or a size")
    if output is not None:
        read = sources_of(artifact=artifact, model=options.get("base"))
        check_output(output, overwrite=overwrite, sources=read)
    if is_survey(artifact):
        outcome = resize_survey(load_survey(artifact), keep=keep, size=size, **options)
    else:
        opened = load_elastic(artifact, **options)
        outcome = settle_outcome(opened, artifact, keep=keep, size=size)
    result = Result(**vars(outcome))
    if output is not None:
        save_outcome(result, output, overwrite=overwrite)
        result.output = Path(output)
    return result


survey_of = survey  # the function, where an argument has its name

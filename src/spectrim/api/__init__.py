"""The Python interface; the command line says the same with the same words.

Words are keywords of these functions, each declared once in `run/words.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from spectrim.api.afterwards import adapter, heal
from spectrim.api.costing import compress_at_cost
from spectrim.api.reading import evaluate, export, inspect, plan
from spectrim.arguments import check_fraction, check_path, refuse_unused
from spectrim.errors import BudgetError
from spectrim.run.compress import Outcome, run_recipe
from spectrim.run.finding import check_brought
from spectrim.run.learned.elastic import ElasticModel, open_elastic
from spectrim.run.learned.resizing import settle_outcome
from spectrim.run.loading import load_model
from spectrim.run.memory import goes_out_of_core
from spectrim.run.options import RunOptions
from spectrim.run.out_of_core import check_out_of_core, check_survey_out_of_core
from spectrim.run.places import places
from spectrim.run.predicting import estimate
from spectrim.run.reading_words import ElasticWords, ResizeWords
from spectrim.run.resolving import check_size, resolve_recipe
from spectrim.run.sizing import for_size
from spectrim.run.sources import sources_of
from spectrim.run.store.saving import describe_outcome, save_outcome
from spectrim.run.store.saving_elastic import save_survey_as_elastic as elastic
from spectrim.run.survey.replanning import bring_plan
from spectrim.run.survey.surveying import resize_survey, survey_model
from spectrim.run.texts import look_up, own_text
from spectrim.run.word import among, takes
from spectrim.run.words import CompressWords, RecipeWords, SurveyWords
from spectrim.shortage import tells_of_shortage
from spectrim.sizes import parse_size
from spectrim.storage.atomic import check_output
from spectrim.storage.survey_file import is_survey, load_survey, save_survey
from spectrim.storage.survey_record import Survey

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
@takes(CompressWords)
def compress(model: str | Path | nn.Module, **words: Unpack[CompressWords]) -> Result:
    """Compress a model and, with `output`, save it as an ordinary Hugging Face folder.

    Args:
        model: a hub name, a folder, or a loaded causal language model, which is changed in place.
        **words: those below.

    Raises:
        SpectrimError: every refusal; nothing is left half-written.
    """
    asked: dict[str, Any] = dict(words)
    if asked["max_loss"] is not None or asked["energy"] is not None:
        return compress_at_cost(compress, survey, {"model": model, **asked})
    output, planned, surveyed = asked["output"], asked["plan"], asked["survey"]
    check_path(output=output)
    check_brought(model, plan=planned, survey=surveyed)
    check_size(asked)
    options = RunOptions.among(asked)
    resolved = resolve_recipe(asked["recipe"], **among(asked, RecipeWords))
    if planned is not None:
        stored = {name: asked[name] for name in ("storage", "weights", "alike")}
        refuse_unused("the plan says how it is stored", stored)
    given = own_text(asked["text"])
    look_up(asked["text"], asked["evaluation_text"])
    if output is None or not resolved.gives_every_size:
        alone = {"self_contained": options.self_contained}
        refuse_unused("no elastic artifact is written", alone)
    read = sources_of(model=model, survey=surveyed, plan=planned, text=asked["text"])
    with places(output, options, sources=read) as folder:
        known = {"planned": planned is not None, "own_text": given is not None}
        check = partial(check_out_of_core, resolved, **known)
        kept = folder is not None and output is not None
        lazily = goes_out_of_core(model, options, check=check, kept=kept)
        loaded = load_model(model, replace(options, out_of_core=lazily), whole=True)
        resolved = for_size(resolved, asked, loaded)
        chosen, found = bring_plan(planned, loaded)
        if chosen is not None:
            resolved = resolved.with_changes(keep=chosen.keep)
        if surveyed is not None:
            found = surveyed if isinstance(surveyed, Survey) else load_survey(surveyed)
        size = None if asked["size"] is None else parse_size(asked["size"])
        more = {"text": given, "size": size, "plan": chosen, "survey": found, "work": folder}
        result = Result(**vars(run_recipe(loaded, resolved, options, **more)))
        if output is None:
            describe_outcome(result)
        else:
            if options.team.leads:
                base = loaded.name if options.self_contained else None
                save_outcome(result, output, overwrite=options.overwrite, original=base)
            options.team.barrier()  # what the others return is there as well
            result.output = Path(output)
    return result


@tells_of_shortage
@takes(SurveyWords)
def survey(model: str | Path | nn.Module, **words: Unpack[SurveyWords]) -> Survey:
    """Measure a model once, for any number of plans; the model stays as it is.

    The recipe says objective, calibration and the rule that plans use by default. Out of core, what
    is returned has its factors in `output`.

    Args:
        model: a hub name, a folder, or a loaded causal language model.
        **words: those below.

    Raises:
        SpectrimError: every refusal.
    """
    asked: dict[str, Any] = dict(words)
    resolved = resolve_recipe(asked["recipe"], **among(asked, RecipeWords))
    output, scores, options = asked["output"], asked["scores"], RunOptions.among(asked)
    check_path(output=output)
    check_brought(model)
    given = own_text(asked["text"])
    look_up(asked["text"])
    read = sources_of(model=model, text=asked["text"])
    with places(output, options, sources=read) as folder:
        lazily = goes_out_of_core(
            model,
            options,
            check=partial(check_survey_out_of_core, resolved, scores, own_text=given is not None),
            kept=output is not None,
        )
        loaded = load_model(model, replace(options, out_of_core=lazily), whole=True)
        made = survey_model(loaded, resolved, options, text=given, scores=scores, work=folder)
        if output is not None:
            if options.team.leads:
                save_survey(made, output, overwrite=options.overwrite)
            options.team.barrier()
        if lazily:
            assert output is not None  # there is one: pieces in the work folder are about to go
            made = replace(made, factors=None, folder=Path(output))
    return made


@takes(ElasticWords)
def load_elastic(artifact: str | Path, **words: Unpack[ElasticWords]) -> ElasticModel:
    """An elastic artifact or a survey with its base model: a model that takes any size.

    Args:
        artifact: the folder, or what it holds in memory.
        **words: those below.

    Raises:
        ArtifactError: a damaged artifact, or a base model that is not the recorded one.
        ModelError: the base model cannot be loaded.
    """
    asked: dict[str, Any] = dict(words)
    options = RunOptions.among(asked)
    return open_elastic(artifact, options, base=asked["base"], score=asked["score"])


@tells_of_shortage
@takes(ResizeWords)
def resize(artifact: str | Path, **words: Unpack[ResizeWords]) -> Result:
    """Another size from an elastic artifact or a survey, in seconds and without data.

    A survey is cut by its recipe's rule, or by the given score.

    Args:
        artifact: the folder.
        **words: those below.

    Raises:
        InputError: below the smallest size, a damaged artifact, or another base model.
    """
    asked: dict[str, Any] = dict(words)
    output, size = asked["output"], {"keep": asked["keep"], "size": asked["size"]}
    check_path(artifact=artifact, output=output)
    check_fraction(keep=size["keep"])
    if (size["keep"] is None) == (size["size"] is None):
        raise BudgetError("give either a keep or a size")
    if output is not None:
        read = sources_of(artifact=artifact, model=asked["base"])
        check_output(output, overwrite=asked["overwrite"], sources=read)
    options, source = RunOptions.among(asked), {"base": asked["base"], "score": asked["score"]}
    if is_survey(artifact):
        outcome = resize_survey(load_survey(artifact), options, **size, **source)
    else:
        outcome = settle_outcome(open_elastic(artifact, options, **source), artifact, **size)
    result = Result(**vars(outcome))
    if output is not None:
        save_outcome(result, output, overwrite=asked["overwrite"])
        result.output = Path(output)
    return result

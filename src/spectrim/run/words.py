"""Every word of the interface, declared once: its type, what it does, and its group in `--help`.

The command line makes its options from these (`cli/words.py`), the functions of `spectrim.api`
their keywords (`takes`). What a recipe holds names the place of its field, whose default stays in
the recipe; what says how and where it is carried out has its default in `RunOptions`. Imports
nothing heavy: `--help` reads it.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypedDict, TypeVar

from spectrim.run.options import RunOptions
from spectrim.run.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spectrim.allocate.plan import Plan
    from spectrim.distributed.team import Team
    from spectrim.recipe import Recipe
    from spectrim.run.texts import UserText
    from spectrim.storage.survey_record import Survey

__all__ = [
    "CALIBRATION",
    "MAKE",
    "MEASURE",
    "OUTPUT",
    "WHERE",
    "WORDS",
    "CompressWords",
    "ElasticWords",
    "EstimateWords",
    "EvaluateWords",
    "RecipeWords",
    "ResizeWords",
    "SavingWords",
    "SurveyWords",
    "Word",
    "among",
    "declared",
    "takes",
]

MAKE = "What to make"
CALIBRATION = "Calibration"
MEASURE = "Measuring"
WHERE = "Where and how"
OUTPUT = "Output"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Word:
    """One word.

    Attributes:
        kind: what the command line reads; None for a word that it lacks or declares itself.
        help: what it does, one sentence.
        group: heading in `--help`.
        metavar: what stands for its value.
        flag: on the command line, where it is not `--name`.
        field: its place in the recipe, by dotted name; None for what is no part of one.
        default: in Python, where it is not that of `RunOptions`.
        name: in Python; with dashes on the command line.
    """

    kind: Any
    help: str
    group: str = WHERE
    metavar: str | None = None
    flag: str | None = None
    field: str | None = None
    default: Any = None
    name: str = ""


class CalibrationWords(TypedDict, total=False):
    """What a recipe says of targets and statistics, by its short names."""

    only: Annotated[
        str | Sequence[str],
        Word(
            list[str],
            "Compress these layers alone; repeatable.",
            *(MAKE, "GLOB"),
            field="targets.only",
            default=(),
        ),
    ]
    skip: Annotated[
        str | Sequence[str],
        Word(
            list[str],
            "Protect layers, e.g. 'model.layers.0.*'; repeatable.",
            *(MAKE, "GLOB"),
            field="targets.skip",
            default=(),
        ),
    ]
    text: Annotated[
        "UserText",
        Word(
            str,
            "wikitext2, c4, ptb, self (sampled from the model), FILE.txt or FILE.jsonl; several "
            "with shares as in a.txt:0.7,b.jsonl:0.3.",
            *(CALIBRATION, "SOURCE"),
            field="calibration.text",
        ),
    ]
    windows: Annotated[
        int | None,
        Word(
            int,
            "Number of calibration windows.",
            *(CALIBRATION, "N"),
            field="calibration.windows",
        ),
    ]
    window_length: Annotated[
        int | None,
        Word(int, "Tokens per window.", CALIBRATION, "TOKENS", field="calibration.window_length"),
    ]
    batch: Annotated[
        int | None,
        Word(
            int,
            "Windows per pass; by default it follows memory.",
            *(CALIBRATION, "N"),
            field="calibration.batch",
        ),
    ]
    bos: Annotated[
        str | None,
        Word(
            str,
            "BOS at the start of calibration windows: none, each or half.",
            CALIBRATION,
            field="calibration.bos",
        ),
    ]
    seed: Annotated[
        int | None, Word(int, "Seed of all randomness.", CALIBRATION, "N", field="seed")
    ]


class RecipeWords(CalibrationWords, total=False):
    """What a recipe says, by its short names."""

    keep: Annotated[
        float | None,
        Word(
            float,
            "Fraction of the targets' bytes that remains, in (0, 1].",
            *(MAKE, "FRACTION"),
            field="keep",
        ),
    ]
    multiple: Annotated[
        int | None, Word(int, "Ranks are multiples of N.", MAKE, "N", field="allocate.multiple")
    ]
    storage: Annotated[
        str | None, Word(str, "factored, packed or auto.", MAKE, field="storage.kind")
    ]
    weights: Annotated[
        str | None,
        Word(
            str,
            "native, int8, int4, intB-gN (B 2 to 8, N 32 to 128), or auto.",
            MAKE,
            field="storage.weights",
        ),
    ]
    effort: Annotated[
        str | None, Word(str, "fast, balanced or thorough, of the default recipe.", MAKE)
    ]


class LoadWords(TypedDict, total=False):
    """How a model is loaded."""

    device: Annotated[
        "str | torch.device", Word(str, "auto, cpu, cuda, cuda:1, mps, ...; default auto.")
    ]
    dtype: Annotated[
        "str | torch.dtype",
        Word(str, "auto (as stored), float32, bfloat16, float16; default auto."),
    ]
    trust_remote_code: Annotated[
        bool, Word(bool, "Run Python code that comes with the checkpoint.")
    ]


class PlaceWords(LoadWords, total=False):
    """Which recipe, and where it is carried out."""

    recipe: Annotated[
        "str | Path | Recipe",
        Word(
            str,
            "A recipe by name (`spectrim recipes`) or YAML file.",
            *(MAKE, "NAME|FILE"),
            default="spectrim",
        ),
    ]
    out_of_core: Annotated[
        bool | None,
        Word(
            bool,
            "Read blocks from the checkpoint one at a time; default where memory is short.",
            flag="--out-of-core/--in-memory",
        ),
    ]
    offload_streams: Annotated[
        str | Path | None, Word(Path, "Keep the hidden states on disk in DIR.", metavar="DIR")
    ]


class SavingWords(PlaceWords, total=False):
    """What every function that writes a result takes."""

    output: Annotated[
        str | Path | None,
        Word(None, "Folder to write; it must not exist or be empty.", OUTPUT),
    ]
    overwrite: Annotated[
        bool, Word(bool, "Replace OUT if spectrim wrote all that is in it.", OUTPUT)
    ]
    tokenizer: Annotated[Any, Word(None, "For model objects.")]
    progress: Annotated[Progress | None, Word(None, "Told of stages and steps.")]
    team: Annotated[
        "Team | None",
        Word(None, "Processes that share the run (`distributed.launch`); all call this alike."),
    ]


class SurveyWords(CalibrationWords, SavingWords, total=False):
    """The words of `spectrim.survey`."""

    scores: Annotated[
        Collection[str] | None,
        Word(None, "first_order, second_order, kfac, measured, table; default the first two."),
    ]


class EstimateWords(RecipeWords, PlaceWords, total=False):
    """The words of a dry run."""

    size: Annotated[
        str | int | None,
        Word(str, 'Size of the whole checkpoint, e.g. "3.5GB", for --keep.', MAKE, "BYTES"),
    ]
    max_loss: Annotated[
        float | None,
        Word(
            float,
            "As small as possible at this loss per token, for --keep; compresses twice.",
            *(MAKE, "NATS"),
        ),
    ]
    energy: Annotated[
        float | None,
        Word(float, "Of its objective that each layer keeps, for --keep.", MAKE, "SHARE"),
    ]
    plan: Annotated[
        "Plan | str | Path | None", Word(Path, "Ranks from `spectrim plan -o FILE`.", MAKE, "FILE")
    ]


class CompressWords(EstimateWords, SavingWords, total=False):
    """The words of `spectrim.compress`."""

    survey: Annotated[
        "Survey | str | Path | None",
        Word(Path, "Ranks and decompositions from a survey.", MAKE, "DIR"),
    ]
    measure: Annotated[
        bool,
        Word(
            bool,
            "Perplexity before and after, at most a tenth of the time; the default.",
            MEASURE,
            flag="--measure/--no-measure",
        ),
    ]
    evaluation_text: Annotated[
        "UserText",
        Word(
            str,
            "Text to measure on: wikitext2 (the default of studies), c4, ptb, FILE.txt or "
            "FILE.jsonl.",
            *(MEASURE, "SOURCE"),
        ),
    ]
    on_failure: Annotated[str, Word(str, "error, or keep-unrefined for a block that diverges.")]
    work: Annotated[
        str | Path | None,
        Word(
            Path,
            "Keep finished blocks in DIR; default OUT.work, removed when OUT is there.",
            *(OUTPUT, "DIR"),
        ),
    ]
    resume: Annotated[
        bool,
        Word(
            bool,
            "Go on from what an earlier run finished, as by default.",
            OUTPUT,
            flag="--resume/--no-resume",
        ),
    ]
    self_contained: Annotated[
        bool, Word(bool, "Include the base model in an elastic artifact.", OUTPUT)
    ]


class ElasticWords(LoadWords, total=False):
    """The words of `spectrim.load_elastic`."""

    base: Annotated[
        "str | Path | nn.Module | None",
        Word(None, "Where the base model lies now, if not under its recorded name."),
    ]
    score: Annotated[
        str | None, Word(None, "What orders the components of a survey, in place of its rule.")
    ]


class ResizeWords(ElasticWords, total=False):
    """The words of `spectrim.resize`."""

    output: Annotated[
        str | Path | None, Word(None, "Where to write an ordinary Hugging Face folder.", OUTPUT)
    ]
    keep: Annotated[float | None, Word(None, "Fraction of the target bytes.")]
    size: Annotated[
        str | int | None, Word(None, 'Instead of keep, of the whole checkpoint: bytes or "2.1GB".')
    ]
    overwrite: Annotated[bool, Word(bool, "Replace an existing output folder.", OUTPUT)]


class EvaluateWords(LoadWords, total=False):
    """The words of `spectrim.evaluate`."""

    text: Annotated[
        "UserText",
        Word(
            str,
            "wikitext2 (the default), c4, ptb, FILE.txt or FILE.jsonl; several separated by "
            "commas.",
            *(MEASURE, "SOURCE"),
        ),
    ]
    against: Annotated[
        "str | Path | nn.Module | None",
        Word(str, "The dense model to compare with.", MEASURE, "MODEL"),
    ]
    window_length: Annotated[
        int | str | None,
        Word(
            str,
            "Tokens per window, or max for the model's longest; default 2048.",
            *(MEASURE, "TOKENS|max"),
        ),
    ]
    max_tokens: Annotated[int | None, Word(int, "Score at most N tokens.", MEASURE, "N")]
    batch: Annotated[int, Word(int, "Windows per forward pass.", MEASURE, "N", default=8)]
    bos: Annotated[
        str,
        Word(
            str,
            "BOS: none (default), at each window's start, or start of text.",
            MEASURE,
            default="none",
        ),
    ]
    tasks: Annotated[
        str | Sequence[str],
        Word(
            str,
            "Zero-shot tasks of lm-eval by name, literature (seven tasks), or offline.",
            *(MEASURE, "A,B,..."),
            default=(),
        ),
    ]
    limit: Annotated[int | None, Word(int, "Questions per task.", MEASURE, "N")]
    task_folders: Annotated[
        Sequence[str | Path],
        Word(
            list[Path],
            "lm-eval task files of your own.",
            *(MEASURE, "DIR", "--task-folder"),
            default=(),
        ),
    ]
    tokenizer: Annotated[Any, Word(None, "For model objects.")]


class StudyWords(TypedDict, total=False):
    """What only commands of studies take."""

    recipes: Annotated[str, Word(str, "Recipes by name, or YAML files.", MAKE, "A,B,...")]
    objectives: Annotated[
        str,
        Word(
            str,
            "Objectives to run block by block with equal ranks: plain, whitened, shifted, ...",
            *(MAKE, "A,B,..."),
        ),
    ]
    evaluation_length: Annotated[
        str,
        Word(
            str,
            "Tokens per evaluation window; default 2048 or the model's longest.",
            *(MEASURE, "TOKENS|max"),
        ),
    ]
    max_tokens: Annotated[int, Word(int, "Score at most N tokens.", MEASURE, "N")]


def declared(kind: type) -> dict[str, Word]:
    """The words of a function, by name, with their defaults."""
    ways = {one.name: one.default for one in fields(RunOptions) if one.default is not MISSING}
    return {
        name: replace(word, name=name, default=ways.get(name, word.default))
        for name, word in ((n, a.__metadata__[0]) for n, a in kind.__annotations__.items())
    }


WORDS: dict[str, Word] = declared(SurveyWords) | declared(CompressWords) | declared(StudyWords)
"""All of them, by name."""


def among(words: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The words of this kind among those of a call."""
    return {name: words[name] for name in kind.__annotations__ if name in words}


def takes(kind: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose keywords are these words; it gets all of them, with their defaults.

    Its signature and its text show every word to `help()`.

    Args:
        kind: one of the classes above.
    """
    words = declared(kind)

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def told(*args: P.args, **given: P.kwargs) -> R:
            unknown = next((name for name in given if name not in own | words.keys()), None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown, words, 1, 0.0)[0]
                raise TypeError(
                    f"{function.__name__}() takes no {unknown!r}; the nearest word is {near!r}"
                )
            every = {name: word.default for name, word in words.items()} | given
            whole: Any = function
            return whole(*args, **every)

        signature = inspect.signature(function)
        before = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = {p.name for p in before}
        shown: Any = told
        shown.__signature__ = signature.replace(
            parameters=[*before, *(_shown(word, kind) for word in words.values())]
        )
        lines = (f"        {name}: {word.help}" for name, word in words.items())
        shown.__doc__ = "\n".join([f"{function.__doc__}\n    Words:", *lines, "    "])
        return told

    return wrap


def _shown(word: Word, kind: type) -> inspect.Parameter:
    said = kind.__annotations__[word.name].__origin__
    return inspect.Parameter(
        word.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=word.default,
        annotation=getattr(said, "__forward_arg__", said),
    )

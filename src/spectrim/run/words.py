"""Every word of the interface, declared once: its type, what it does, and its group in `--help`.

The command line makes its options from these (`cli/words.py`), the functions of `spectrim.api`
their keywords (`word.takes`). What a recipe holds names the place of its field, whose default stays
in the recipe; what says how and where it is carried out has its default in `RunOptions`.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from spectrim.run.loading_words import RestoringWords
from spectrim.run.progress import Progress
from spectrim.run.word import CALIBRATION, MAKE, MEASURE, OUTPUT, Word, declared

if TYPE_CHECKING:
    from spectrim.allocate.plan import Plan
    from spectrim.distributed.team import Team
    from spectrim.recipe import Recipe
    from spectrim.run.texts import UserText
    from spectrim.storage.survey_record import Survey


class TextWords(TypedDict, total=False):
    """Which text the statistics come from."""

    text: Annotated[
        "UserText",
        Word(
            "wikitext2, c4, ptb, self (sampled from the model), FILE.txt or FILE.jsonl; several "
            "with shares as in a.txt:0.7,b.jsonl:0.3.",
            "SOURCE",
            CALIBRATION,
            "calibration.text",
        ),
    ]
    windows: Annotated[
        int | None, Word("Number of calibration windows.", "N", CALIBRATION, "calibration.windows")
    ]
    window_length: Annotated[
        int | None, Word("Tokens per window.", "TOKENS", CALIBRATION, "calibration.window_length")
    ]
    batch: Annotated[
        int | None,
        Word(
            "Windows per pass; by default it follows memory.", "N", CALIBRATION, "calibration.batch"
        ),
    ]
    seed: Annotated[int | None, Word("Seed of all randomness.", "N", CALIBRATION, "seed")]


class CalibrationWords(TextWords, total=False):
    """What a recipe says of targets and statistics, by its short names."""

    only: Annotated[
        str | Sequence[str],
        Word(
            "Compress these layers alone; repeatable.",
            "GLOB",
            MAKE,
            "targets.only",
            default=(),
            kind=list[str],
        ),
    ]
    skip: Annotated[
        str | Sequence[str],
        Word(
            "Protect layers, e.g. 'model.layers.0.*'; repeatable.",
            "GLOB",
            MAKE,
            "targets.skip",
            default=(),
            kind=list[str],
        ),
    ]
    bos: Annotated[
        str | None,
        Word(
            "BOS at the start of calibration windows: none, each or half.",
            None,
            CALIBRATION,
            "calibration.bos",
        ),
    ]


class RecipeWords(CalibrationWords, total=False):
    """What a recipe says, by its short names."""

    keep: Annotated[
        float | None,
        Word("Fraction of the targets' bytes that remains, in (0, 1].", "FRACTION", MAKE, "keep"),
    ]
    multiple: Annotated[
        int | None, Word("Ranks are multiples of N.", "N", MAKE, "allocate.multiple")
    ]
    storage: Annotated[
        str | None,
        Word(
            "factored, packed, auto; dense or residual (nothing is cut).",
            None,
            MAKE,
            "storage.kind",
        ),
    ]
    weights: Annotated[
        str | None,
        Word(
            "native, int8, fp8, int4, intB-gN (B 2 to 8, N 32 to 128), or auto.",
            None,
            MAKE,
            "storage.weights",
        ),
    ]
    alike: Annotated[
        bool | None,
        Word("Store q/k/v alike, and gate/up, as engines fuse.", None, MAKE, "storage.alike"),
    ]
    effort: Annotated[
        str | None, Word("fast, balanced or thorough, of the default recipe.", None, MAKE)
    ]


class PlaceWords(RestoringWords, total=False):
    """Which recipe, and where it is carried out."""

    recipe: Annotated[
        "str | Path | Recipe",
        Word(
            "A recipe by name (`spectrim recipes`) or YAML file.",
            "NAME|FILE",
            MAKE,
            default="spectrim",
        ),
    ]
    out_of_core: Annotated[
        bool | None,
        Word(
            "Read blocks from the checkpoint one at a time; default where memory is short.",
            flag="--out-of-core/--in-memory",
        ),
    ]
    offload_streams: Annotated[
        str | Path | None, Word("Keep the hidden states on disk in DIR.", "DIR", kind=Path)
    ]


class SavingWords(PlaceWords, total=False):
    """What every function that writes a result takes."""

    output: Annotated[
        str | Path | None, Word("Folder to write; it must not exist or be empty.", None, OUTPUT)
    ]
    overwrite: Annotated[
        bool, Word("Replace OUT if spectrim wrote all that is in it.", None, OUTPUT)
    ]
    tokenizer: Annotated[Any, Word("For model objects.")]
    progress: Annotated[Progress | None, Word("Told of stages and steps.")]
    team: Annotated[
        "Team | None",
        Word("Processes that share the run (`distributed.launch`); all call this alike."),
    ]


class SurveyWords(CalibrationWords, SavingWords, total=False):
    """The words of `spectrim.survey`."""

    scores: Annotated[
        Collection[str] | None,
        Word(
            "first_order, second_order, kfac, measured, table; default the first two.",
            "NAMES",
            MAKE,
        ),
    ]


class EstimateWords(RecipeWords, PlaceWords, total=False):
    """The words of a dry run."""

    size: Annotated[
        str | int | None,
        Word('Size of the whole checkpoint, e.g. "3.5GB", for --keep.', "BYTES", MAKE),
    ]
    max_loss: Annotated[
        float | None,
        Word(
            "As small as possible at this loss per token, for --keep; compresses twice.",
            "NATS",
            MAKE,
        ),
    ]
    energy: Annotated[
        float | None, Word("Of its objective that each layer keeps, for --keep.", "SHARE", MAKE)
    ]
    plan: Annotated[
        "Plan | str | Path | None",
        Word("Ranks from `spectrim plan -o FILE`.", "FILE", MAKE, kind=Path),
    ]


class CompressWords(EstimateWords, SavingWords, total=False):
    """The words of `spectrim.compress`."""

    survey: Annotated[
        "Survey | str | Path | None",
        Word("Ranks and decompositions from a survey.", "DIR", MAKE, kind=Path),
    ]
    measure: Annotated[
        bool,
        Word(
            "Perplexity before and after, at most a tenth of the time; the default.",
            None,
            MEASURE,
            flag="--measure/--no-measure",
        ),
    ]
    evaluation_text: Annotated[
        "UserText",
        Word(
            "Text to measure on: wikitext2 (the default of studies), c4, ptb, FILE.txt or "
            "FILE.jsonl.",
            "SOURCE",
            MEASURE,
        ),
    ]
    on_failure: Annotated[str, Word("error, or keep-unrefined for a block that diverges.")]
    work: Annotated[
        str | Path | None,
        Word(
            "Keep finished blocks in DIR; default OUT.work, removed when OUT is there.",
            "DIR",
            OUTPUT,
            kind=Path,
        ),
    ]
    resume: Annotated[
        bool,
        Word(
            "Go on from what an earlier run finished, as by default.",
            None,
            OUTPUT,
            flag="--resume/--no-resume",
        ),
    ]
    self_contained: Annotated[
        bool, Word("Include the base model in an elastic artifact.", None, OUTPUT)
    ]


WORDS: dict[str, Word] = declared(SurveyWords) | declared(CompressWords)
"""All of them, by name."""

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
            str,
            "SOURCE",
            "wikitext2, c4, ptb, self (sampled from the model), FILE.txt or FILE.jsonl; several "
            "with shares as in a.txt:0.7,b.jsonl:0.3.",
            CALIBRATION,
            "calibration.text",
        ),
    ]
    windows: Annotated[
        int | None,
        Word(int, "N", "Number of calibration windows.", CALIBRATION, "calibration.windows"),
    ]
    window_length: Annotated[
        int | None,
        Word(int, "TOKENS", "Tokens per window.", CALIBRATION, "calibration.window_length"),
    ]
    batch: Annotated[
        int | None,
        Word(
            int,
            "N",
            "Windows per pass; by default it follows memory.",
            CALIBRATION,
            "calibration.batch",
        ),
    ]
    seed: Annotated[int | None, Word(int, "N", "Seed of all randomness.", CALIBRATION, "seed")]


class CalibrationWords(TextWords, total=False):
    """What a recipe says of targets and statistics, by its short names."""

    only: Annotated[
        str | Sequence[str],
        Word(
            list[str],
            "GLOB",
            "Compress these layers alone; repeatable.",
            MAKE,
            "targets.only",
            default=(),
        ),
    ]
    skip: Annotated[
        str | Sequence[str],
        Word(
            list[str],
            "GLOB",
            "Protect layers, e.g. 'model.layers.0.*'; repeatable.",
            MAKE,
            "targets.skip",
            default=(),
        ),
    ]
    bos: Annotated[
        str | None,
        Word(
            str,
            None,
            "BOS at the start of calibration windows: none, each or half.",
            CALIBRATION,
            "calibration.bos",
        ),
    ]


class RecipeWords(CalibrationWords, total=False):
    """What a recipe says, by its short names."""

    keep: Annotated[
        float | None,
        Word(
            float,
            "FRACTION",
            "Fraction of the targets' bytes that remains, in (0, 1].",
            MAKE,
            "keep",
        ),
    ]
    multiple: Annotated[
        int | None, Word(int, "N", "Ranks are multiples of N.", MAKE, "allocate.multiple")
    ]
    storage: Annotated[
        str | None,
        Word(str, None, "factored, packed, auto, or dense (nothing is cut).", MAKE, "storage.kind"),
    ]
    weights: Annotated[
        str | None,
        Word(
            str,
            None,
            "native, int8, int4, intB-gN (B 2 to 8, N 32 to 128), or auto.",
            MAKE,
            "storage.weights",
        ),
    ]
    alike: Annotated[
        bool | None,
        Word(bool, None, "Store q/k/v alike, and gate/up, as engines fuse.", MAKE, "storage.alike"),
    ]
    effort: Annotated[
        str | None, Word(str, None, "fast, balanced or thorough, of the default recipe.", MAKE)
    ]


class PlaceWords(RestoringWords, total=False):
    """Which recipe, and where it is carried out."""

    recipe: Annotated[
        "str | Path | Recipe",
        Word(
            str,
            "NAME|FILE",
            "A recipe by name (`spectrim recipes`) or YAML file.",
            MAKE,
            default="spectrim",
        ),
    ]
    out_of_core: Annotated[
        bool | None,
        Word(
            bool,
            None,
            "Read blocks from the checkpoint one at a time; default where memory is short.",
            flag="--out-of-core/--in-memory",
        ),
    ]
    offload_streams: Annotated[
        str | Path | None, Word(Path, "DIR", "Keep the hidden states on disk in DIR.")
    ]


class SavingWords(PlaceWords, total=False):
    """What every function that writes a result takes."""

    output: Annotated[
        str | Path | None,
        Word(None, None, "Folder to write; it must not exist or be empty.", OUTPUT),
    ]
    overwrite: Annotated[
        bool, Word(bool, None, "Replace OUT if spectrim wrote all that is in it.", OUTPUT)
    ]
    tokenizer: Annotated[Any, Word(None, None, "For model objects.")]
    progress: Annotated[Progress | None, Word(None, None, "Told of stages and steps.")]
    team: Annotated[
        "Team | None",
        Word(
            None, None, "Processes that share the run (`distributed.launch`); all call this alike."
        ),
    ]


class SurveyWords(CalibrationWords, SavingWords, total=False):
    """The words of `spectrim.survey`."""

    scores: Annotated[
        Collection[str] | None,
        Word(
            None, None, "first_order, second_order, kfac, measured, table; default the first two."
        ),
    ]


class EstimateWords(RecipeWords, PlaceWords, total=False):
    """The words of a dry run."""

    size: Annotated[
        str | int | None,
        Word(str, "BYTES", 'Size of the whole checkpoint, e.g. "3.5GB", for --keep.', MAKE),
    ]
    max_loss: Annotated[
        float | None,
        Word(
            float,
            "NATS",
            "As small as possible at this loss per token, for --keep; compresses twice.",
            MAKE,
        ),
    ]
    energy: Annotated[
        float | None,
        Word(float, "SHARE", "Of its objective that each layer keeps, for --keep.", MAKE),
    ]
    plan: Annotated[
        "Plan | str | Path | None", Word(Path, "FILE", "Ranks from `spectrim plan -o FILE`.", MAKE)
    ]


class CompressWords(EstimateWords, SavingWords, total=False):
    """The words of `spectrim.compress`."""

    survey: Annotated[
        "Survey | str | Path | None",
        Word(Path, "DIR", "Ranks and decompositions from a survey.", MAKE),
    ]
    measure: Annotated[
        bool,
        Word(
            bool,
            None,
            "Perplexity before and after, at most a tenth of the time; the default.",
            MEASURE,
            flag="--measure/--no-measure",
        ),
    ]
    evaluation_text: Annotated[
        "UserText",
        Word(
            str,
            "SOURCE",
            "Text to measure on: wikitext2 (the default of studies), c4, ptb, FILE.txt or "
            "FILE.jsonl.",
            MEASURE,
        ),
    ]
    on_failure: Annotated[
        str, Word(str, None, "error, or keep-unrefined for a block that diverges.")
    ]
    work: Annotated[
        str | Path | None,
        Word(
            Path,
            "DIR",
            "Keep finished blocks in DIR; default OUT.work, removed when OUT is there.",
            OUTPUT,
        ),
    ]
    resume: Annotated[
        bool,
        Word(
            bool,
            None,
            "Go on from what an earlier run finished, as by default.",
            OUTPUT,
            flag="--resume/--no-resume",
        ),
    ]
    self_contained: Annotated[
        bool, Word(bool, None, "Include the base model in an elastic artifact.", OUTPUT)
    ]


WORDS: dict[str, Word] = declared(SurveyWords) | declared(CompressWords)
"""All of them, by name."""

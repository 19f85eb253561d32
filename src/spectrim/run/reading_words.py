"""The words of functions that come after a run, declared as in `words.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from spectrim.run.loading_words import LoadWords, RestoringWords
from spectrim.run.progress import Progress
from spectrim.run.word import CALIBRATION, MAKE, MEASURE, OUTPUT, Word
from spectrim.run.words import TextWords

if TYPE_CHECKING:
    from torch import nn

    from spectrim.run.texts import UserText


class ElasticWords(RestoringWords, total=False):
    """The words of `spectrim.load_elastic`."""

    base: Annotated[
        "str | Path | nn.Module | None",
        Word(None, None, "Where the base model lies now, if not under its recorded name."),
    ]
    score: Annotated[
        str | None,
        Word(None, None, "What orders the components of a survey, in place of its rule."),
    ]


class ResizeWords(ElasticWords, total=False):
    """The words of `spectrim.resize`."""

    output: Annotated[
        str | Path | None,
        Word(None, None, "Where to write an ordinary Hugging Face folder.", OUTPUT),
    ]
    keep: Annotated[float | None, Word(None, None, "Fraction of the target bytes.")]
    size: Annotated[
        str | int | None,
        Word(None, None, 'Instead of keep, of the whole checkpoint: bytes or "2.1GB".'),
    ]
    overwrite: Annotated[bool, Word(bool, None, "Replace an existing output folder.", OUTPUT)]


class FolderWords(LoadWords, total=False):
    """What functions take that write a folder."""

    output: Annotated[
        str | Path | None, Word(None, None, "Folder to write; it must not exist or be empty.")
    ]
    overwrite: Annotated[
        bool, Word(bool, None, "Replace DIR if spectrim wrote all that is in it.", OUTPUT)
    ]
    progress: Annotated[Progress | None, Word(None, None, "Told of stages and steps.")]


class AdapterWords(FolderWords, TextWords, total=False):
    """The words of `spectrim.adapter`."""

    rank: Annotated[int, Word(int, "R", "Of every layer's adapter; default 16.", MAKE, default=16)]
    metric: Annotated[
        str | None,
        Word(
            str,
            "NAME",
            "kfac (predicted loss, default with a text), whitened, or plain (without one).",
            MAKE,
        ),
    ]
    allow_differences: Annotated[
        bool,
        Word(
            bool,
            None,
            "Leave norms, embeddings and other weights as in BASE.",
            MAKE,
            default=False,
        ),
    ]
    tokenizer: Annotated[Any, Word(None, None, "For model objects.")]


class HealWords(FolderWords, total=False):
    """The words of `spectrim.heal`."""

    text: Annotated["UserText", Word(None, None, "To train on, as for `compress`.")]
    parts: Annotated[
        str,
        Word(
            str,
            None,
            "factors (all numbers; default) or lora (needs peft).",
            MAKE,
            default="factors",
        ),
    ]
    teacher: Annotated[
        str | Path | None,
        Word(str, "MODEL", "The original: learn its distribution instead.", MAKE),
    ]
    steps: Annotated[int | None, Word(int, "N", "At most; default 200.", MAKE)]
    batch: Annotated[int | None, Word(int, "N", "Windows per step; default 8.", MAKE)]
    rank: Annotated[int | None, Word(int, "R", "Of lora's updates; default 8.", MAKE)]
    learning_rate: Annotated[
        float | None, Word(float, "RATE", "Peak; for factors a share of their size.", MAKE)
    ]
    windows: Annotated[
        int, Word(int, "N", "An eighth of them chooses the step.", CALIBRATION, default=256)
    ]
    window_length: Annotated[
        int | None, Word(int, "TOKENS", "Default 512, or what the model allows.", CALIBRATION)
    ]
    seed: Annotated[int, Word(int, "N", "Of windows and order.", CALIBRATION, default=0)]


class EvaluateWords(LoadWords, total=False):
    """The words of `spectrim.evaluate`."""

    text: Annotated[
        "UserText",
        Word(
            str,
            "SOURCE",
            "wikitext2 (the default), c4, ptb, FILE.txt or FILE.jsonl; several separated by "
            "commas.",
            MEASURE,
        ),
    ]
    against: Annotated[
        "str | Path | nn.Module | None",
        Word(str, "MODEL", "The dense model to compare with.", MEASURE),
    ]
    window_length: Annotated[
        int | str | None,
        Word(
            str,
            "TOKENS|max",
            "Tokens per window, or max for the model's longest; default 2048.",
            MEASURE,
        ),
    ]
    max_tokens: Annotated[int | None, Word(int, "N", "Score at most N tokens.", MEASURE)]
    batch: Annotated[int, Word(int, "N", "Windows per forward pass.", MEASURE, default=8)]
    bos: Annotated[
        str,
        Word(
            str,
            None,
            "BOS: none (default), at each window's start, or start of text.",
            MEASURE,
            default="none",
        ),
    ]
    tasks: Annotated[
        str | Sequence[str],
        Word(
            str,
            "A,B,...",
            "Zero-shot tasks of lm-eval by name, literature (seven tasks), or offline.",
            MEASURE,
            default=(),
        ),
    ]
    limit: Annotated[int | None, Word(int, "N", "Questions per task.", MEASURE)]
    task_folders: Annotated[
        Sequence[str | Path],
        Word(
            list[Path],
            "DIR",
            "lm-eval task files of your own.",
            MEASURE,
            flag="--task-folder",
            default=(),
        ),
    ]
    tokenizer: Annotated[Any, Word(None, None, "For model objects.")]


class StudyWords(TypedDict, total=False):
    """What only commands of studies take."""

    recipes: Annotated[str, Word(str, "A,B,...", "Recipes by name, or YAML files.", MAKE)]
    objectives: Annotated[
        str,
        Word(
            str,
            "A,B,...",
            "Objectives to run block by block with equal ranks: plain, whitened, shifted, ...",
            MAKE,
        ),
    ]
    evaluation_length: Annotated[
        str,
        Word(
            str,
            "TOKENS|max",
            "Tokens per evaluation window; default 2048 or the model's longest.",
            MEASURE,
        ),
    ]
    max_tokens: Annotated[int, Word(int, "N", "Score at most N tokens.", MEASURE)]

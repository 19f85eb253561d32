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
        Word("Where the base model lies now, if not under its recorded name.", "MODEL"),
    ]
    score: Annotated[
        str | None,
        Word(
            "What orders a survey's components: kfac, second_order, first_order or energy; default "
            "the best that it holds.",
            group=MAKE,
        ),
    ]


class ResizeWords(ElasticWords, total=False):
    """The words of `spectrim.resize`."""

    output: Annotated[
        str | Path | None, Word("Where to write an ordinary Hugging Face folder.", None, OUTPUT)
    ]
    keep: Annotated[float | None, Word("Fraction of the target bytes.")]
    size: Annotated[
        str | int | None, Word('Instead of keep, of the whole checkpoint: bytes or "2.1GB".')
    ]
    overwrite: Annotated[bool, Word("Replace an existing output folder.", None, OUTPUT)]


class FolderWords(LoadWords, total=False):
    """What functions take that write a folder."""

    output: Annotated[str | Path | None, Word("Folder to write; it must not exist or be empty.")]
    overwrite: Annotated[
        bool, Word("Replace DIR if spectrim wrote all that is in it.", None, OUTPUT)
    ]
    progress: Annotated[Progress | None, Word("Told of stages and steps.")]


class AdapterWords(FolderWords, TextWords, total=False):
    """The words of `spectrim.adapter`."""

    rank: Annotated[int, Word("Of every layer's adapter; default 16.", "R", MAKE, default=16)]
    metric: Annotated[
        str | None,
        Word(
            "kfac (predicted loss, default with a text), whitened, or plain (without one).",
            "NAME",
            MAKE,
        ),
    ]
    allow_differences: Annotated[
        bool,
        Word("Leave norms, embeddings and other weights as in BASE.", None, MAKE, default=False),
    ]
    tokenizer: Annotated[Any, Word("For model objects.")]


class HealWords(FolderWords, total=False):
    """The words of `spectrim.heal`."""

    text: Annotated["UserText", Word("To train on, as for `compress`.")]
    parts: Annotated[
        str,
        Word("factors (all numbers; default) or lora (needs peft).", None, MAKE, default="factors"),
    ]
    teacher: Annotated[
        str | Path | None, Word("The original: learn its distribution instead.", "MODEL", MAKE)
    ]
    steps: Annotated[int | None, Word("At most; default 200.", "N", MAKE)]
    batch: Annotated[int | None, Word("Windows per step; default 8.", "N", MAKE)]
    rank: Annotated[int | None, Word("Of lora's updates; default 8.", "R", MAKE)]
    learning_rate: Annotated[
        float | None, Word("Peak; for factors a share of their size.", "RATE", MAKE)
    ]
    windows: Annotated[
        int, Word("An eighth of them chooses the step.", "N", CALIBRATION, default=256)
    ]
    window_length: Annotated[
        int | None, Word("Default 512, or what the model allows.", "TOKENS", CALIBRATION)
    ]
    seed: Annotated[int, Word("Of windows and order.", "N", CALIBRATION, default=0)]


class EvaluateWords(LoadWords, total=False):
    """The words of `spectrim.evaluate`."""

    text: Annotated[
        "UserText",
        Word(
            "wikitext2 (the default), c4, ptb, FILE.txt or FILE.jsonl; several separated by "
            "commas.",
            "SOURCE",
            MEASURE,
        ),
    ]
    against: Annotated[
        "str | Path | nn.Module | None", Word("The dense model to compare with.", "MODEL", MEASURE)
    ]
    adapter: Annotated[
        str | Path | None, Word("A LoRA folder that every MODEL wears.", "DIR", MEASURE)
    ]
    window_length: Annotated[
        str | int | None,
        Word(
            "Tokens per window, or max for the model's longest; default 2048.",
            "TOKENS|max",
            MEASURE,
        ),
    ]
    max_tokens: Annotated[int | None, Word("Score at most N tokens.", "N", MEASURE)]
    batch: Annotated[int, Word("Windows per forward pass.", "N", MEASURE, default=8)]
    bos: Annotated[
        str,
        Word(
            "BOS: none (default), at each window's start, or start of text.",
            None,
            MEASURE,
            default="none",
        ),
    ]
    tasks: Annotated[
        str | Sequence[str],
        Word(
            "Zero-shot tasks of lm-eval by name, literature (seven tasks), or offline.",
            "A,B,...",
            MEASURE,
            default=(),
        ),
    ]
    limit: Annotated[int | None, Word("Questions per task.", "N", MEASURE)]
    task_folders: Annotated[
        Sequence[str | Path],
        Word(
            "lm-eval task files of your own.",
            "DIR",
            MEASURE,
            flag="--task-folder",
            default=(),
            kind=list[Path],
        ),
    ]
    tokenizer: Annotated[Any, Word("For model objects.")]


class PlanWords(TypedDict, total=False):
    """The words of `spectrim.plan`; None is what the survey's recipe says."""

    keep: Annotated[float | None, Word("Fraction of the target bytes.", "FRACTION", MAKE)]
    size: Annotated[
        str | int | None, Word('Of the whole checkpoint, e.g. "3.5GB", for keep.', "BYTES", MAKE)
    ]
    rule: Annotated[
        str | None, Word("uniform, loss_ratio, sensitivity, zero_sum or knapsack.", None, MAKE)
    ]
    score: Annotated[
        str | None,
        Word(
            "What knapsack minimizes: energy, first_order, second_order, kfac, measured.",
            group=MAKE,
        ),
    ]
    floor: Annotated[
        float | None, Word("Least rank as a share of the break-even rank, in [0, 1).", None, MAKE)
    ]
    multiple: Annotated[int | None, Word("Ranks are multiples of N.", "N", MAKE)]


class BenchWords(LoadWords, total=False):
    """What `spectrim bench` takes."""

    batch: Annotated[str, Word("Sequences side by side; default 1,8,32.", "N,...", MEASURE)]
    lengths: Annotated[str, Word("Tokens per prompt; default 32,128.", "N,...", MEASURE)]
    new_tokens: Annotated[int, Word("Tokens to write per sequence; default 16.", "N", MEASURE)]
    repeats: Annotated[int, Word("Runs behind each median; default 3.", "N", MEASURE)]
    prepared: Annotated[
        bool,
        Word(
            "Arrange the weights of both for this device; the default.",
            group=MEASURE,
            flag="--prepare/--as-loaded",
        ),
    ]
    memory: Annotated[str, Word("What weights may take: 2GB, or any.", "SIZE", MEASURE)]
    latent_cache: Annotated[
        bool, Word("Time OUT also with a cache of latents, not heads.", group=MEASURE)
    ]


class ReportWords(LoadWords, total=False):
    """What `spectrim report` takes."""

    against: Annotated[str, Word("The dense model to compare with.", "MODEL", MEASURE)]
    others: Annotated[
        list[Path],
        Word(
            "Another result to follow along depth.", "OUT", MEASURE, flag="--with", kind=list[Path]
        ),
    ]
    curve: Annotated[Path, Word("What `spectrim curve` wrote.", "DIR", MAKE, kind=Path)]
    survey: Annotated[Path, Word("What `spectrim survey` wrote: spectra.", "DIR", MAKE, kind=Path)]
    text: Annotated[str, Word("Text to measure on, with --against.", "SOURCE", MEASURE)]
    window_length: Annotated[int, Word("Tokens per window.", "TOKENS", MEASURE)]
    max_tokens: Annotated[int, Word("Score at most N tokens.", "N", MEASURE)]
    prompts: Annotated[
        list[str],
        Word("Continued by both models.", "TEXT", MEASURE, flag="--prompt", kind=list[str]),
    ]
    overwrite: Annotated[bool, Word("Replace FILE if it exists.", group=OUTPUT)]


class StudyWords(TypedDict, total=False):
    """What only commands of studies take."""

    recipes: Annotated[str, Word("Recipes by name, or YAML files.", "A,B,...", MAKE)]
    objectives: Annotated[
        str,
        Word(
            "Objectives to run block by block with equal ranks: plain, whitened, shifted, ...",
            "A,B,...",
            MAKE,
        ),
    ]
    evaluation_length: Annotated[
        str,
        Word(
            "Tokens per evaluation window; default 2048 or the model's longest.",
            "TOKENS|max",
            MEASURE,
        ),
    ]
    max_tokens: Annotated[int, Word("Score at most N tokens.", "N", MEASURE)]

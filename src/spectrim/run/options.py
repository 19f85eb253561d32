"""Every word of a run, declared once: what it may be, what it does, and which group it is in.

The command line makes its options from these, the Python interface its keywords. What a recipe
holds is a `Word` with the place of its field, whose default stays in the recipe; how and where a
recipe is carried out is a field of `RunOptions`. Imports nothing heavy: `--help` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from spectrim.distributed.team import Team
    from spectrim.run.job import Progress

__all__ = ["CALIBRATION", "MAKE", "MEASURE", "OUTPUT", "WHERE", "WORDS", "RunOptions", "Word"]

MAKE = "What to make"
CALIBRATION = "Calibration"
MEASURE = "Measuring"
WHERE = "Where and how"
OUTPUT = "Output"


@dataclass(frozen=True)
class Word:
    """One option.

    Attributes:
        name: in Python; with dashes on the command line.
        kind: what the command line reads.
        help: what it does, one sentence.
        group: heading in `--help`.
        metavar: what stands for its value.
        flag: on the command line, where it is not `--name`.
        field: its place in the recipe, by dotted name; None for what is no part of one.
    """

    name: str
    kind: Any
    help: str
    group: str
    metavar: str | None = None
    flag: str | None = None
    field: str | None = None


def _said(
    kind: Any,
    help: str,
    *,
    metavar: str | None = None,
    flag: str | None = None,
    group: str = WHERE,
) -> dict[str, Any]:
    """What a field of `RunOptions` says of its word."""
    said = {"kind": kind, "help": help, "metavar": metavar, "flag": flag, "group": group}
    return {"word": said}


@dataclass(frozen=True)
class RunOptions:
    """How and where a recipe is carried out; nothing here changes what is made.

    Attributes without a word on the command line:
        progress: told of stages and steps.
        team: processes that share the run; None for this one alone.
        exactly: whether the user asked for the recipe's window length.
    """

    device: str | torch.device = field(
        default="auto", metadata=_said(str, "auto, cpu, cuda, cuda:1, mps, ...; default auto.")
    )
    dtype: str | torch.dtype = field(
        default="auto",
        metadata=_said(str, "auto (as stored), float32, bfloat16, float16; default auto."),
    )
    out_of_core: bool | None = field(
        default=None,
        metadata=_said(
            bool,
            "Read blocks from the checkpoint one at a time; default where memory is short.",
            flag="--out-of-core/--in-memory",
        ),
    )
    offload_streams: Path | str | None = field(
        default=None, metadata=_said(Path, "Keep the hidden states on disk in DIR.", metavar="DIR")
    )
    on_failure: str = field(
        default="error",
        metadata=_said(str, "error, or keep-unrefined for a block that diverges."),
    )
    trust_remote_code: bool = field(
        default=False, metadata=_said(bool, "Run Python code that comes with the checkpoint.")
    )
    work: Path | str | None = field(
        default=None,
        metadata=_said(
            Path,
            "Keep finished blocks in DIR; default OUT.work, removed when OUT is there.",
            metavar="DIR",
            group=OUTPUT,
        ),
    )
    resume: bool = field(
        default=True,
        metadata=_said(
            bool,
            "Go on from what an earlier run finished, as by default.",
            flag="--resume/--no-resume",
            group=OUTPUT,
        ),
    )
    self_contained: bool = field(
        default=False,
        metadata=_said(bool, "Include the base model in an elastic artifact.", group=OUTPUT),
    )
    overwrite: bool = field(
        default=False,
        metadata=_said(bool, "Replace OUT if spectrim wrote all that is in it.", group=OUTPUT),
    )
    progress: Progress | None = None
    team: Team | None = None
    exactly: bool = False

    @classmethod
    def taken_from(cls, words: Mapping[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
        """The options among some words, and the other words."""
        names = {one.name for one in fields(cls)} - {"exactly"}
        own = {name: value for name, value in words.items() if name in names}
        rest = {name: value for name, value in words.items() if name not in names}
        return replace(cls(), **own), rest


_RECIPE = (
    Word(
        "keep",
        float,
        "Fraction of the targets' bytes that remains, in (0, 1].",
        MAKE,
        metavar="FRACTION",
        field="keep",
    ),
    Word(
        "only",
        list[str],
        "Compress these layers alone; repeatable.",
        MAKE,
        metavar="GLOB",
        field="targets.only",
    ),
    Word(
        "skip",
        list[str],
        "Protect layers, e.g. 'model.layers.0.*'; repeatable.",
        MAKE,
        metavar="GLOB",
        field="targets.skip",
    ),
    Word(
        "multiple",
        int,
        "Ranks are multiples of N.",
        MAKE,
        metavar="N",
        field="allocate.multiple",
    ),
    Word("storage", str, "factored, packed or auto.", MAKE, field="storage.kind"),
    Word(
        "weights",
        str,
        "native, int8, int4, intB-gN (B 2 to 8, N 32 to 128), or auto.",
        MAKE,
        field="storage.weights",
    ),
    Word(
        "text",
        str,
        "wikitext2, c4, ptb, self (sampled from the model), FILE.txt or FILE.jsonl; several "
        "with shares as in a.txt:0.7,b.jsonl:0.3.",
        CALIBRATION,
        metavar="SOURCE",
        field="calibration.text",
    ),
    Word(
        "windows",
        int,
        "Number of calibration windows.",
        CALIBRATION,
        metavar="N",
        field="calibration.windows",
    ),
    Word(
        "window_length",
        int,
        "Tokens per window.",
        CALIBRATION,
        metavar="TOKENS",
        field="calibration.window_length",
    ),
    Word(
        "batch",
        int,
        "Windows per pass; by default it follows memory.",
        CALIBRATION,
        metavar="N",
        field="calibration.batch",
    ),
    Word(
        "bos",
        str,
        "BOS at the start of calibration windows: none, each or half.",
        CALIBRATION,
        field="calibration.bos",
    ),
    Word("seed", int, "Seed of all randomness.", CALIBRATION, metavar="N", field="seed"),
)
_BROUGHT = (
    Word("size", str, 'Size of the whole checkpoint, e.g. "3.5GB", for --keep.', MAKE, "BYTES"),
    Word(
        "max_loss",
        float,
        "As small as possible at this loss per token, for --keep; compresses twice.",
        MAKE,
        "NATS",
    ),
    Word("energy", float, "Of its objective that each layer keeps, for --keep.", MAKE, "SHARE"),
    Word("recipe", str, "A recipe by name (`spectrim recipes`) or YAML file.", MAKE, "NAME|FILE"),
    Word("effort", str, "fast, balanced or thorough, of the default recipe.", MAKE),
    Word("plan", Path, "Ranks from `spectrim plan -o FILE`.", MAKE, "FILE"),
    Word("survey", Path, "Ranks and decompositions from a survey.", MAKE, "DIR"),
    Word("recipes", str, "Recipes by name, or YAML files.", MAKE, "A,B,..."),
    Word(
        "objectives",
        str,
        "Objectives to run block by block with equal ranks: plain, whitened, shifted, ...",
        MAKE,
        "A,B,...",
    ),
    Word(
        "evaluation_text",
        str,
        "Text to measure on: wikitext2 (the default of studies), c4, ptb, FILE.txt or FILE.jsonl.",
        MEASURE,
        "SOURCE",
    ),
    Word(
        "evaluation_length",
        str,
        "Tokens per evaluation window; default 2048 or the model's longest.",
        MEASURE,
        "TOKENS|max",
    ),
    Word(
        "measure",
        bool,
        "Perplexity before and after, at most a tenth of the time; the default.",
        MEASURE,
        flag="--measure/--no-measure",
    ),
    Word("max_tokens", int, "Score at most N tokens.", MEASURE, "N"),
)

WORDS: dict[str, Word] = {
    word.name: word
    for word in (
        *_RECIPE,
        *_BROUGHT,
        *(
            Word(one.name, **one.metadata["word"])
            for one in fields(RunOptions)
            if "word" in one.metadata
        ),
    )
}
"""All of them, by name."""

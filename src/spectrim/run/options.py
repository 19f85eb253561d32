"""How and where a recipe is carried out: one record, from the interface down to the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.arguments import check_path
from spectrim.errors import InputError
from spectrim.run.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

    from spectrim.distributed.team import Team

ON_FAILURE = ("error", "keep-unrefined")


def _alone() -> Team:
    # Not above: the command line reads the defaults below before torch is wanted.
    from spectrim.distributed.team import Team

    return Team()


@dataclass(frozen=True)
class RunOptions:
    """How and where a recipe is carried out; nothing here changes what is made.

    The words are declared, each with its help, in `run/words.py`; their defaults are here.

    Attributes:
        device: `auto`, or a torch device.
        dtype: to work in; `auto` is fp32 on a CPU.
        tokenizer: for model objects.
        trust_remote_code: run code that comes with the checkpoint.
        dequantize: restore the weights of a quantised checkpoint.
        out_of_core: leave blocks in the checkpoint; None decides by the memory that is free.
        offload_streams: folder for hidden states; None for memory.
        on_failure: `error`, or `keep-unrefined`.
        work: the user's folder for what is finished.
        resume: go on from what an earlier run finished.
        self_contained: include the base checkpoint in an elastic artifact.
        overwrite: replace an existing output.
        measure: perplexity before and after.
        evaluation_text: another text to measure on as well.
        progress: told of stages and steps.
        team: processes that share the run.
        exactly: whether the user asked for the recipe's window length.
    """

    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    tokenizer: Any = None
    trust_remote_code: bool = False
    dequantize: bool = False
    out_of_core: bool | None = None
    offload_streams: Path | str | None = None
    on_failure: str = "error"
    work: Path | str | None = None
    resume: bool = True
    self_contained: bool = False
    overwrite: bool = False
    measure: bool = True
    evaluation_text: str | Path | Sequence[str] | torch.Tensor | None = None
    progress: Progress = field(default_factory=Silent)
    team: Team = field(default_factory=_alone)
    exactly: bool = False

    def __post_init__(self) -> None:
        check_path(work=self.work, offload_streams=self.offload_streams)
        if self.on_failure not in ON_FAILURE:
            raise InputError(f"on_failure is {self.on_failure!r}; use {' or '.join(ON_FAILURE)}")

    @classmethod
    def among(cls, words: Mapping[str, Any]) -> RunOptions:
        """Those among the words of a call; a team works where its process does.

        Raises:
            InputError: what no option may be.
        """
        names = {one.name for one in fields(cls)} - {"exactly"}
        own: dict[str, Any] = {n: v for n, v in words.items() if n in names}
        own = {n: v for n, v in own.items() if v is not None or n not in ("progress", "team")}
        own["exactly"] = words.get("window_length") is not None
        options = cls(**own)
        return replace(options, device=options.team.device or options.device)

    @property
    def streams(self) -> Path | None:
        """Folder for memory-mapped hidden states."""
        return None if self.offload_streams is None else Path(self.offload_streams)

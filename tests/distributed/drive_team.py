"""What both processes of a team do: collectives, every case, the program, and at last a failure.

Each rank writes what it saw to `rank-N.json` and `rank-N.safetensors` in the working folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from pathlib import Path

import cases
import torch
from safetensors.torch import save_file

import spectrim
from spectrim.cli.main import main
from spectrim.distributed.launch import membership
from spectrim.errors import NonFiniteError, NumericalError
from spectrim.moments.accumulate import MomentAccumulator
from spectrim.run.cut import sequential
from spectrim.run.progress import Silent

RESUMED = ("spectrim", "svd-llm")
"""A sequential flow after a survey, and a one-shot flow that cuts several blocks together."""

COMPRESS = ["model", "--text", "text.txt", "--windows", "9", "--window-length", "32"]


def collectives(team) -> dict:
    """What the methods of a team give here; values are chosen so that sums are exact."""
    rank = team.rank
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (101, 5), generator=generator).double()
    accumulator = MomentAccumulator("group", {"C", "absolute"})
    accumulator.add(x[team.share(len(x))])
    accumulator.reduce(team)
    moments = accumulator.moments()
    many = [torch.full((3, k), float(rank + k)) for k in (1, 2, 3)]
    many.append(torch.arange(4.0)[::2] + rank)
    team.sum_(many)
    kinds = {}
    for dtype in (torch.bfloat16, torch.int8, torch.int32, torch.float64):
        tensor = torch.full((2, 3), 7 * rank).to(dtype)
        team.broadcast_([tensor], source=1)
        kinds[str(dtype)] = tensor.double().tolist()
    turned = torch.full((2, 3), float(rank)).mT
    team.broadcast_([turned], source=1)

    def raises() -> float:
        if rank == 1:
            raise NonFiniteError("the sum is not finite")
        return 1.0

    with contextlib.suppress(NumericalError):
        team.total(raises)
        raise AssertionError("no error arrived")
    return {
        "tokens": moments.tokens,
        "exact": torch.equal(moments.C, x.mT @ x) and torch.equal(moments.absolute, x.abs().sum(0)),
        "many": [t.tolist() for t in many],
        "kinds": kinds,
        "turned": turned.tolist(),
        "gathered": team.gather({"rank": rank, "value": math.inf if rank else 0.1}),
        "total": team.total(lambda: 0.1 + rank),
    }


def program(*arguments: str) -> dict:
    """Call `main` as the console script does."""
    stdout, stderr = io.StringIO(), io.StringIO()
    sys.argv = ["spectrim", *arguments]
    code = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


class Stop(Exception):
    """What ends a run in the middle, on all ranks at the same point."""


class StopAtFirstBlock(Silent):
    """Progress that ends the run when a block is cut."""

    def advance(self, stage: str, note: str = "") -> None:
        if stage == "compress":
            raise Stop


def resumed(team, recipe: str, *, lazily: bool) -> dict:
    """A run that is stopped after a block, and begun again, beside one in memory that is not."""
    output = f"{recipe}-lazily" if lazily else recipe
    text = {"text": "text.txt", "windows": 9, "window_length": 32}
    options = {"recipe": recipe, "keep": 0.6, "measure": False, **text}
    with contextlib.suppress(Stop):
        given = {"output": output, "team": team, "out_of_core": lazily, **options}
        spectrim.compress("model", progress=StopAtFirstBlock(), **given)
        raise AssertionError("the run was not stopped")
    left = sorted(path.stem for path in Path(f"{output}.work").glob("cut-*")) if team.leads else []
    again = spectrim.compress("model", **given)
    if not lazily:
        spectrim.compress("model", output=f"{recipe}-at-once", team=team, **options)
    return {"left": left, "notes": again.report["notes"]}


def break_rank_1(rank: int) -> None:
    """A target of block 1 cannot be decomposed on rank 1, while rank 0 waits for its factors."""
    original = sequential.replace_target

    def broken(target, *arguments, **options):
        if rank == 1:
            raise NonFiniteError(f"{target.name} is\nnot finite")
        return original(target, *arguments, **options)

    sequential.replace_target = broken


def live() -> None:
    """The life of one process; it ends with an error."""
    with membership() as team:
        rank = team.rank
        story = {"collectives": collectives(team), "team": [team.size, str(team.device)]}
        found = cases.everything(team=team)
        flat = {f"{case}/{name}": t for case, those in found.items() for name, t in those.items()}
        save_file(flat, f"rank-{rank}.safetensors")
        for lazily in (False, True):
            name = "lazily" if lazily else "resumed"
            story[name] = {recipe: resumed(team, recipe, lazily=lazily) for recipe in RESUMED}
    story["compress"] = program("compress", *COMPRESS, "-o", "two")
    story["survey"] = program("survey", *COMPRESS, "-o", "survey", "-q")
    story["evaluate"] = program("evaluate", "model", "--text", "text.txt")
    Path(f"rank-{rank}.json").write_text(json.dumps(story), encoding="utf-8")
    break_rank_1(rank)
    # The last act, seen from outside: its processes end wherever they are.
    sys.argv = ["spectrim", "compress", *COMPRESS, "-o", "new", "-q"]
    main()

"""Two processes give what one gives, and fail as one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import cases
import pytest
import torch
from drive_program import prepare
from drive_team import COMPRESS, RESUMED, live, program
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from architectures import tiny, windows
from children import child
from spectrim.distributed.launch import membership
from spectrim.distributed.team import Team
from spectrim.errors import InputError, RecipeError
from spectrim.recipes import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.opening import open_job
from spectrim.run.options import RunOptions

SECONDS = 240  # of which a quiet machine needs a tenth

# Forwards of 11 windows in parts of 5 and 6 round differently than in batches of 4, 4 and 3, and so
# does one process with another batch: these bounds hold for both.
FP64, FP32 = 1e-8, 1e-5
SURVEYED = 1e-5
"""Surveys hold fp32 factors and transformers' norms compute in fp32."""
TRAINED = 1e-6
"""Adam divides by the size of a gradient, which enlarges rounding where gradients are small."""
UNDETERMINED = 1e-4
"""Least squares on the few tokens here leave directions open, in which fp32 rounding decides: what
the layers do is compared, not what they are."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(folder: Path) -> None:
    """What torchrun does, whose processes need not import anything here: they are forks."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    signal.alarm(SECONDS)
    disable_progress_bar()  # as where the command line is what imports transformers
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    said = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        start_method="fork",
    )
    with contextlib.suppress(ChildFailedError):
        elastic_launch(config, live)()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, in which two processes have lived their whole story."""
    folder = tmp_path_factory.mktemp("team")
    before = Path.cwd()
    os.chdir(folder)
    try:
        prepare()
        one = program("compress", *COMPRESS, "-o", "one")
    finally:
        os.chdir(before)
    assert one["code"] == 0, one["stderr"]
    child(lambda: start_two(folder))
    assert (folder / "rank-1.json").exists(), (folder / "stderr.txt").read_text()
    (folder / "one.json").write_text(json.dumps(one), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stories(place):
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def tensors(place):
    """Case -> name -> tensor, of each rank."""
    found = []
    for rank in (0, 1):
        cases_of: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(place / f"rank-{rank}.safetensors").items():
            case, _, name = key.partition("/")
            cases_of.setdefault(case, {})[name] = tensor
        found.append(cases_of)
    return found


def assert_same(one, two, tolerance):
    assert one.keys() == two.keys()
    for name in one:
        distance = torch.dist(one[name], two[name])
        assert distance <= tolerance * one[name].norm(), f"{name}: {distance / one[name].norm()}"


@pytest.mark.parametrize("case", cases.CUTS)
def test_two_processes_cut_as_one(case, tensors):
    one = cases.cut(case)
    assert len(one) > 3
    assert torch.equal(one["ranks"], tensors[0][case]["ranks"])
    loose = any(word in case for word in ("measured", "corrections", "fisher", "kfac"))
    trained = case in ("block", "distill")
    assert_same(one, tensors[0][case], SURVEYED if loose else TRAINED if trained else FP64)


@pytest.mark.parametrize("case", cases.SINGLE)
def test_two_processes_cut_as_one_in_single_precision(case, tensors):
    one, two = cases.cut(case, dtype=torch.float32), tensors[0][f"{case} in fp32"]
    assert torch.equal(one["ranks"], two["ranks"])
    if case.startswith("one-shot"):
        assert_same(one, two, FP32)
    else:
        does = ("errors", "logits")
        assert_same({n: one[n] for n in does}, {n: two[n] for n in does}, UNDETERMINED)


@pytest.mark.parametrize("case", cases.SURVEYS)
def test_two_processes_survey_as_one(case, tensors):
    assert_same(cases.survey(case), tensors[0][f"survey {case}"], SURVEYED)


def test_all_processes_end_with_the_same_bytes(tensors):
    one, other = tensors
    assert one.keys() == other.keys()
    for case in one:
        for name in one[case]:
            assert torch.equal(one[case][name], other[case][name]), (case, name)


def test_sums_are_exact_and_everybody_hears_everything(stories):
    for story in stories:
        seen = story["collectives"]
        assert story["team"] == [2, "cpu"]
        assert seen["exact"] and seen["tokens"] == 101
        assert seen["many"] == [[[2.0 * k + 1] * k] * 3 for k in (1, 2, 3)] + [[1.0, 5.0]]
        assert all(value == [[7.0] * 3] * 2 for value in seen["kinds"].values())
        assert seen["turned"] == [[1.0] * 2] * 3
        assert seen["gathered"] == [{"rank": 0, "value": 0.1}, {"rank": 1, "value": float("inf")}]
        assert seen["total"] == 0.1 + 1.1


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_program_writes_what_one_process_writes(place, stories):
    assert [story["compress"]["code"] for story in stories] == [0, 0]
    assert "keep" in stories[0]["compress"]["stdout"]
    assert stories[1]["compress"]["stdout"] == stories[1]["compress"]["stderr"] == ""
    assert (place / "survey").is_dir()
    reports = [place / name / "spectrim_report.json" for name in ("one", "two")]
    one, two = (json.loads(report.read_text()) for report in reports)
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert one["calibration"] == two["calibration"]
    assert [t["rank"] for t in one["targets"]] == [t["rank"] for t in two["targets"]]
    # Packed forms may pivot on another row where two are as good: the errors agree all the same.
    for a, b in zip(one["targets"], two["targets"], strict=True):
        assert a["measured_error"] == pytest.approx(b["measured_error"], rel=1e-3, abs=1e-7)
    assert weights(place / "one").keys() == weights(place / "two").keys()


@pytest.mark.parametrize("recipe", RESUMED)
@pytest.mark.parametrize("way", ["resumed", "lazily"])
def test_two_processes_go_on_where_they_were(recipe, way, place, stories):
    leader, other = (story[way][recipe] for story in stories)
    output = recipe if way == "resumed" else f"{recipe}-lazily"
    assert leader["left"]  # finished and kept by the leader
    assert any("resumed after" in note for note in leader["notes"])
    assert leader["notes"] == other["notes"]
    assert not list(place.glob(f"{output}.work*"))  # nor the other's copies
    one, two = weights(place / output), weights(place / f"{recipe}-at-once")
    assert one.keys() == two.keys()
    if (recipe, way) == ("spectrim", "lazily"):
        # Gradients of several processes round in another order block by block than all at once.
        reports = [place / name / "spectrim_report.json" for name in (output, f"{recipe}-at-once")]
        told = [json.loads(report.read_text())["targets"] for report in reports]
        for a, b in zip(*told, strict=True):
            assert a["rank"] == b["rank"]
            assert a["measured_error"] == pytest.approx(b["measured_error"], rel=1e-3, abs=1e-7)
    else:
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_command_for_one_process_is_refused_once(stories):
    leader, other = (story["evaluate"] for story in stories)
    assert leader["code"] == other["code"] == 2
    assert leader["stderr"].startswith("error: `spectrim evaluate` runs in one process")
    assert leader["stderr"].count("\n") == 1
    assert other["stderr"] == other["stdout"] == ""


def test_recipes_and_windows_that_cannot_be_shared_are_refused():
    team = Team(rank=1, size=3)
    loaded = LoadedModel(tiny("llama")[0], None, "tiny", torch.float32)
    with pytest.raises(RecipeError, match=r"'soco'.*3 were started.*without torchrun"):
        run_recipe(loaded, get_recipe("soco"), RunOptions(team=team))
    with pytest.raises(InputError, match="2 calibration windows cannot be shared by 3 processes"):
        open_job(loaded, get_recipe("svd-llm"), RunOptions(team=team), text=windows(2, 12))


def test_a_failure_on_one_rank_ends_all_with_one_message(place):
    said = (place / "stderr.txt").read_text(encoding="utf-8")
    errors = re.findall(r"^error: .*$", said, flags=re.MULTILINE)
    assert len(errors) == 1
    assert re.match(r"error: rank 1 of 2: model\.layers\.\d+\.\S+ is not finite$", errors[0])
    # torchrun itself reports its children's end; none of ours shows where it was.
    assert "spectrim/run" not in said and "spectrim/distributed" not in said
    assert not (place / "new").exists()


def killed_when_both_are_there(rank: int, port: int, tell) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with membership(tell=tell) as team:
        team.barrier()
        if team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        team.barrier()


def test_a_killed_process_leaves_nobody_waiting():
    forks, port, started = multiprocessing.get_context("fork"), free_port(), time.monotonic()
    heard, saying = forks.Pipe(duplex=False)
    ranks = [
        forks.Process(target=killed_when_both_are_there, args=(rank, port, saying.send))
        for rank in (0, 1)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(SECONDS)
    assert ranks[1].exitcode == -signal.SIGKILL
    assert ranks[0].exitcode not in (None, 0)
    assert heard.poll() and heard.recv().startswith(
        "rank 0 of 2: lost contact with another process"
    )
    assert time.monotonic() - started < SECONDS

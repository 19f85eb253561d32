"""The program as users meet it: its start, its refusals, and one whole job, in real processes."""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from transformers.utils.logging import disable_progress_bar

from children import child
from cli.drive_program import LIGHT, SHELLS, tell
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe

PROGRAM = Path(sys.executable).with_name("spectrim")
DRIVER = Path(__file__).with_name("drive_program.py")
HELP_SECONDS = 0.6  # 0.3 on an idle machine; the rest is for a busy one


def spectrim(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed console script."""
    return subprocess.run(
        [PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_help_is_instant():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert spectrim("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert statistics.median(seconds) < HELP_SECONDS


def test_the_module_is_the_same_program_and_imports_nothing_heavy():
    module = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "spectrim", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    script = spectrim("--help")
    assert module.stdout.splitlines()[1:] == script.stdout.splitlines()[1:]
    imported = {line.rpartition("|")[2].strip() for line in module.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "numpy", "rich", "pydantic", "yaml"}


def test_a_wrong_keep_is_answered_before_anything_heavy_is_imported():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "spectrim", "demo", "--keep", "60"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy"}


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a fresh process answers without torch."""
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    folder = tmp_path_factory.mktemp("light")
    run = subprocess.run(
        [sys.executable, DRIVER], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_tab_key_completes_commands(light, shell):
    shown, found = light["completion"][shell]
    assert "_SPECTRIM_COMPLETE" in shown
    assert "resize" in found
    assert "compress" not in found


def test_version_and_recipes_on_a_narrow_terminal_and_in_a_pipe(light):
    version = light["version"].split()
    assert version[0] == "spectrim"
    assert re.fullmatch(r"\d+\.\d+\.\d+", version[1])
    for width, listed in light["recipes"].items():
        assert max(len(line) for line in listed.splitlines()) <= int(width)
        assert "svd-llm" in listed
        assert "\x1b" not in listed


def test_a_shown_recipe_can_be_saved_and_used(light):
    shown = light["shown"]
    assert all(part in shown for part in ("Truncation-aware", "2403.07378", "U_kᵀ"))
    assert Recipe.from_yaml(shown).hash() == get_recipe("svd-llm").hash()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a process saw that is a fork of this one, which has imported torch already."""
    folder = tmp_path_factory.mktemp("program")

    def act() -> dict:
        os.chdir(folder)
        os.environ.pop("COLUMNS", None)
        disable_progress_bar()  # as where the program is what imports transformers
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return tell()

    status, told = child(act)
    assert status == 0
    return told


def test_the_script_refuses_as_its_main_does():
    run = spectrim("squeeze")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("command", LIGHT)
def test_a_light_refusal_is_one_clear_error(light, command):
    seen = light["refusals"][command]
    assert seen["code"] == 2
    assert seen["stdout"] == ""
    complaints = [x for x in seen["stderr"].splitlines() if x.lower().startswith("error: ")]
    assert len(complaints) == 1
    assert LIGHT[command] in complaints[0]
    assert "Traceback" not in seen["stderr"]
    assert not light["torch"]


REFUSALS = {
    "unknown model": "no-such-model",
    "unknown recipe": "no-such-recipe",
    "unknown text": "no-such-text",
    "short text": "short.txt",
    "keep zero": "keep",
    "keep above one": "keep",
    "keep and size": "size",
    "size too small": "reached",
    "size unreadable": "3.5QB",
    "output not empty": "--overwrite",
    "output is a file": "not a folder",
    "compressed twice": "already compressed",
    "unknown storage": "storage",
    "plan not a plan": "plan",
    "not a model": "no-weights",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_with_exit_code_2_and_leaves_nothing(story, case):
    seen = story["refusals"][case]
    assert seen["code"] == 2, seen
    assert seen["stdout"] == ""
    lines = seen["stderr"].splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert REFUSALS[case] in lines[-1]
    assert "Traceback" not in seen["stderr"]
    assert seen["new"] == []


def test_every_refusal_was_tried(story):
    assert set(story["refusals"]) == set(REFUSALS)


def test_a_whole_job_prints_results_on_stdout_and_progress_on_stderr(story):
    job = story["job"]
    assert [step["code"] for step in job.values()] == [0] * len(job)
    compress = job["compress"]
    assert "keep" in compress["stdout"]
    assert re.search(r"nats per token more +[+-]\S+ ± ", compress["stdout"])
    assert "out" in compress["new"]
    assert "done in" in compress["stderr"]
    assert "done in" not in compress["stdout"]
    assert job["quiet compress"]["stderr"] == ""


def test_inspect_evaluate_and_export_agree(story):
    job = story["job"]
    inspected = json.loads(job["inspect"]["stdout"])
    assert 0 < inspected["achieved_keep"] <= 0.6
    for target in inspected["targets"]:
        assert (target["rank"] is None) == (target["storage"] == "dense")
    assert json.loads(job["export"]["stdout"])["bytes"] == inspected["dense_bytes"]
    dense, compressed, exported = json.loads(job["evaluate"]["stdout"])
    assert "difference" not in dense
    paired = compressed["difference"]["text.txt"]
    change = compressed["perplexity"]["text.txt"]["nll"] - dense["perplexity"]["text.txt"]["nll"]
    assert paired["nll"] == pytest.approx(change)
    assert compressed["stored_bytes"] < dense["stored_bytes"] == exported["stored_bytes"]
    assert compressed["parameters"] == inspected["parameters"]
    values = [r["perplexity"]["text.txt"]["perplexity"] for r in (dense, compressed, exported)]
    assert values[1] == pytest.approx(values[2], rel=1e-4)
    assert values[0] != pytest.approx(values[1], rel=1e-5)


def test_an_interrupted_job_says_what_is_left_and_ends_with_130(story):
    seen = story["interrupted"]
    assert seen["code"] == 130
    last = seen["stderr"].splitlines()[-1]
    assert last.startswith("interrupted: ") and "new.lock" not in last
    assert ("nothing was left behind" in last) or ("the same command goes on from there" in last)
    assert set(seen["new"]) <= {"new.work"}
    assert "Traceback" not in seen["stderr"]

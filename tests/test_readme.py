"""The README runs line by line: every command parses, and every offline one does its work.

Names in capitals stand for a tiny model and a small text, and studies get settings that take a
moment; the lines themselves are run as they are printed, in their order.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from architectures import tiny
from spectrim.cli.main import app
from spectrim.demo.run import CALIBRATION
from spectrim.demo.run import MODEL as BUNDLED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text):
    lines = [line.strip() for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE)]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("spectrim ")]


COMMANDS = commands(README)
FIRST = commands(README.partition("### Every size")[0])
"""What a new user meets; surveys and studies follow with `-m slow`."""

SMALL = ("--windows", "4", "--window-length", "32")
MEASURED = ("--evaluation-length", "32", "--max-tokens", "300")
TINY = {
    "compress": SMALL,
    "survey": SMALL,
    "evaluate": ("--window-length", "32", "--max-tokens", "300"),
    "curve": (*SMALL, *MEASURED),
    "layer-errors": (*SMALL, *MEASURED),
    "calibration-study": ("--windows", "4,8", "--window-length", "32", *MEASURED),
}
"""Options that are added so that a command takes a moment."""

ELSEWHERE = {
    "slider": "a server that runs until it is stopped: tests/serve/test_browser.py",
    "compare": "starts a process for every recipe: tests/studies/test_compare_runs.py",
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_parses(words):
    command, rest, name = typer.main.get_command(app), list(words[1:]), "spectrim"
    context = command.context_class(command, info_name=name)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None, name
    command.make_context(name, rest, parent=context)


def test_every_script_of_the_readme_exists():
    scripts = re.findall(r"python (benchmarks/\w+\.py)", README)
    assert scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with MODEL and TEXT.txt, in which the README is followed."""
    folder = tmp_path_factory.mktemp("readme")
    made, _ = tiny("llama", vocab_size=4096, max_position_embeddings=64)
    made.to(torch.bfloat16).save_pretrained(folder / "MODEL")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / "MODEL")
    text = CALIBRATION.read_text(encoding="utf-8")[:20_000]
    (folder / "TEXT.txt").write_text(text, encoding="utf-8")
    # The bundled recipe of a small training, with the steps of a tiny one.
    recipe = (BUNDLED.parent / "acip.yaml").read_text(encoding="utf-8")
    for old, new in (("steps: 200", "steps: 6"), ("max_steps: 320", "max_steps: 9")):
        assert old in recipe
        recipe = recipe.replace(old, new)
    recipe = recipe.replace("heal_steps: 160", "heal_steps: 2")
    there = folder / "src" / "spectrim" / "demo"
    there.mkdir(parents=True)
    (there / "acip.yaml").write_text(recipe, encoding="utf-8")
    return folder


@pytest.fixture
def quiet_logger():
    logger = logging.getLogger("spectrim")
    before = (list(logger.handlers), logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def follow(given, monkeypatch, place):
    """Carry out commands in their order, and say which."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = (place / "MODEL" / "model.safetensors").stat().st_size
    ran = []
    for words in given:
        name = words[1]
        if name in ELSEWHERE:
            continue
        sized = [f"{int(0.95 * checkpoint)}B" if word == "3.5GB" else word for word in words[1:]]
        arguments = [*sized, *TINY.get(name, ())]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{' '.join(arguments)}\n{done.output}\n{done.exception!r}"
        ran.append(name)
    return ran


@pytest.mark.usefixtures("quiet_logger")
def test_the_first_commands_and_the_python_work_one_after_the_other(place, monkeypatch):
    assert set(follow(FIRST, monkeypatch, place)) == {
        *("compress", "evaluate", "inspect", "export", "recipes")
    }
    for left in ("OUT", "SMALL", "CAREFUL", "SPECTRA", "PARTS", "DENSE"):
        assert (place / left).is_dir(), left
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        small = block.replace('text="TEXT.txt"', 'text="TEXT.txt", windows=4, window_length=32')
        exec(compile(small, "README.md", "exec"), {})


@pytest.mark.slow  # every study, a survey and a training: most of a minute
@pytest.mark.usefixtures("quiet_logger")
def test_the_other_offline_commands_follow(place, monkeypatch):
    given = COMMANDS if not (place / "OUT").is_dir() else COMMANDS[len(FIRST) :]
    assert len(follow(given, monkeypatch, place)) > 8
    for left in ("SURVEY", "RESIZED", "ELASTIC", "TRAINED", "CURVE", "LAYERS", "STUDY"):
        assert (place / left).is_dir(), left
    assert not (place / "ACIP").exists()  # a dry run
    assert (place / "report.html").is_file()

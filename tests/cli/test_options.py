"""The command line and the Python interface say the same with the same words."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from importlib import import_module
from pathlib import Path

import pytest
import typer
import typer.testing

from spectrim import api
from spectrim.cli import (
    adapter,
    compress,
    elastic,
    evaluate,
    export,
    heal,
    options,
    plan,
    resize,
    survey,
)
from spectrim.cli.main import app
from spectrim.cli.session import session, silence_foreign_bars
from spectrim.cli.words import GROUPS
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE
from spectrim.run.options import RunOptions
from spectrim.run.words import WORDS

# Words about the terminal, which a Python caller has no use for.
TERMINAL = {"verbose", "quiet", "as_json", "every"}
COMMANDS = {
    "adapter": adapter.adapter,
    "compress": compress.compress,
    "evaluate": evaluate.evaluate,
    "export": export.export,
    "heal": heal.heal,
    "survey": survey.survey,
    "plan": plan.plan,
    "elastic": elastic.elastic,
    "resize": resize.resize,
}
# Where functions that hand all their options on keep the list of them.
HANDED_TO = {
    "evaluate": "spectrim.api.evaluating.evaluate_models",
}
# `plan` writes the file itself; export has one format; a dry run
# is `api.estimate`.
ONLY_HERE = {
    "compress": {"dry_run"},
    "plan": {"output", "overwrite"},
    "export": {"dense"},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_a_word_of_the_python_interface(name):
    function = getattr(api, name, None)
    if function is None:
        pytest.skip(f"spectrim.api has no {name} yet")
    if name in HANDED_TO:
        module, _, attribute = HANDED_TO[name].rpartition(".")
        function = getattr(import_module(module), attribute)
    words = set(inspect.signature(COMMANDS[name]).parameters)
    words -= TERMINAL | ONLY_HERE.get(name, set())
    assert words <= set(inspect.signature(function).parameters)


def test_no_default_is_repeated_on_the_command_line():
    for command in COMMANDS.values():
        for name, parameter in inspect.signature(command).parameters.items():
            assert parameter.default in (inspect.Parameter.empty, None, False), name


def test_options_not_given_are_left_to_the_library():
    assert options.given(keep=None, seed=0, text="self", flag=False) == {
        "seed": 0,
        "text": "self",
        "flag": False,
    }


@pytest.mark.parametrize("command", ["compress", "survey", "resize", "export", "plan", "inspect"])
def test_every_result_can_be_had_as_json(command):
    module = import_module(f"spectrim.cli.{command}")
    assert "as_json" in inspect.signature(getattr(module, command)).parameters


def test_other_libraries_bars_are_off_unless_the_user_wants_them(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    silence_foreign_bars()
    assert os.environ["TQDM_DISABLE"] == "0"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


@pytest.fixture
def restore_logger():
    logger = logging.getLogger("spectrim")
    before = (list(logger.handlers), logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.mark.usefixtures("restore_logger")
def test_an_interruption_names_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    (tmp_path / "other").touch()
    with pytest.raises(typer.Exit) as end, session(output=output):
        (tmp_path / ".out.partial-7").mkdir()
        (tmp_path / "unrelated").touch()
        raise KeyboardInterrupt
    assert end.value.exit_code == 130
    message = capsys.readouterr().err.replace("\n", " ")
    assert f"left behind: {tmp_path / '.out.partial-7'}" in message
    assert "unrelated" not in message


@pytest.mark.usefixtures("restore_logger")
@pytest.mark.parametrize(
    ("flags", "heard"),
    [
        ({}, ["info", "warning"]),
        ({"verbose": True}, ["debug", "info", "warning"]),
        ({"quiet": True}, ["warning"]),
    ],
)
def test_logging_follows_the_flags(flags, heard, capsys: pytest.CaptureFixture[str]):
    with session(**flags):
        logger = logging.getLogger("spectrim.some.module")
        logger.debug("debug")
        logger.info("info")
        logger.warning("warning")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split()[-1] for line in printed.err.splitlines()] == heard


@pytest.mark.usefixtures("restore_logger")
def test_warnings_of_the_hub_are_heard_where_every_step_is():
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    for verbose in (True, False):
        hub.setLevel(logging.WARNING)
        with session(verbose=verbose):
            assert hub.isEnabledFor(logging.WARNING) is verbose
    hub.setLevel(before)


@pytest.mark.parametrize("name", [word for word, one in WORDS.items() if one.field])
def test_a_word_of_the_recipe_names_a_field_of_its_kind(name):
    """`--windows N` sets `calibration.windows`, which is a whole number there too."""
    word, model = WORDS[name], Recipe
    *sections, last = word.field.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    field = model.model_fields[last]
    shown = str(field.annotation)
    kinds = {kind for kind in (int, float, str, bool) if kind.__name__ in shown}
    kinds = {list[str]} if shown == "tuple[str, ...]" else kinds
    assert word.kind in kinds or "Literal" in str(field.annotation)


def test_help_is_in_groups_and_fits_a_narrow_terminal():
    run = typer.testing.CliRunner().invoke(app, ["compress", "--help"], env={"COLUMNS": "80"})
    lines = run.output.splitlines()
    assert max(len(line) for line in lines) <= 80
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [f"{group}:" for group in GROUPS]
    assert run.output.count("--keep ") == 1


def test_every_option_of_every_command_has_a_group_with_a_place():
    for command in typer.main.get_command(app).commands.values():
        for parameter in command.params:
            assert (getattr(parameter, "rich_help_panel", None) or "Options") in GROUPS


def test_options_of_a_run_are_told_from_the_other_words():
    options = RunOptions.among({"device": "cpu", "keep": 0.5, "resume": False, "progress": None})
    assert (options.device, options.resume, options.dtype) == ("cpu", False, "auto")
    assert options.team.size == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.device = "cuda"


def test_every_option_of_a_run_is_a_word_with_the_same_default():
    shown = inspect.signature(api.compress).parameters
    for field in dataclasses.fields(RunOptions):
        if field.name != "exactly":
            default = None if field.name in ("progress", "team") else field.default
            assert shown[field.name].default == default
    assert shown["recipe"].default == DEFAULT_RECIPE


def test_an_unknown_word_is_refused_with_the_nearest_one():
    with pytest.raises(TypeError, match=r"compress\(\) takes no 'windws'.*'windows'"):
        api.compress("nothing", windws=3)
    with pytest.raises(TypeError, match=r"survey\(\) takes no 'keep'"):
        api.survey("nothing", keep=0.5)


def test_help_shows_every_word_with_what_it_does():
    for function in (api.compress, api.survey, api.resize, api.evaluate, api.load_elastic):
        for name, parameter in inspect.signature(function).parameters.items():
            assert parameter.kind is not parameter.VAR_KEYWORD
            assert f"  {name}: " in function.__doc__ or name == "model"

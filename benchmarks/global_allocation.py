"""Where the ranks should go: allocation rules, scores and selection keys on the bundled model.

    python benchmarks/global_allocation.py --train-text books_train.txt.gz --eval-text eval.txt
    python benchmarks/global_allocation.py ... --only 'knapsack' --keeps 0.6
    python benchmarks/global_allocation.py --show

Protocol, processes and token cache are those of `layerwise.py`. Rows named `select` and `knapsack`
are cut from one survey that they share (its own row says what it cost), so that nothing but the
ranks differs between them; the other rows are whole runs of a recipe.

`select KEY` is the ablation of ZS-SVD's rule: zero-sum, smallest |dL|, most negative dL, smallest
singular value; `unordered` may drop any component of a target, not only its tail.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layerwise import (
    BLOCK,
    EVALUATION,
    FLOORS,
    KEEPS,
    MODEL,
    TOKEN_CACHE,
    environment,
    fill_cache,
    read_results,
    read_windows,
    show,
)
from torch import Tensor, nn

from spectrim.allocate.ladder import Limits
from spectrim.allocate.zero_sum import KEYS, select
from spectrim.evaluate.perplexity import perplexity
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.weights import get_module, read_bias, read_weight, replace_module
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import load_model
from spectrim.run.opening import open_job, other_bytes
from spectrim.run.survey.planning import plan_from_survey
from spectrim.run.survey.survey import make_survey
from spectrim.run.survey.survey_key import survey_key
from spectrim.storage.survey_file import is_survey, load_factors, load_survey, save_survey
from spectrim.storage.survey_record import Survey

RESULTS = Path(__file__).parent / "results" / "global_allocation.json"
SURVEY = Path(tempfile.gettempdir()) / "spectrim-books-survey"
SCORES = ("energy", "first_order", "second_order", "kfac", "measured")
LIMITS = Limits(dtype_bytes=2)


def recipes() -> dict[str, Recipe]:
    """Rows that are runs of a recipe."""
    zs, aa = get_recipe("zs-svd"), get_recipe("aa-svd")
    found = {"svd-llm uniform": get_recipe("svd-llm").with_changes(allocate=FLOORS)}
    for label, stages in (("one-shot", 1), ("1 correction", 2), ("5 corrections", 6)):
        step = {"step": "projected_gradient", "stages": stages}
        found[f"zs-svd {label}"] = zs.with_changes(refine=[step])
        found[f"zs-svd {label}, floor 0.3"] = zs.with_changes(
            refine=[step], allocate={"floor": 0.3}
        )
    found["zs-svd one-shot, faithful"] = zs.with_changes(refine=[], allocate={"faithful": True})
    found["kfac objective, knapsack"] = get_recipe("svd-llm").with_changes(
        decompose={"objective": "kfac"}, allocate={"rule": "knapsack", "score": "kfac"}
    )
    plans = {
        "uniform": {"rule": "uniform"},
        "zs-svd plan": {"rule": "zero_sum", "score": "first_order"},
        "second-order plan": {"rule": "knapsack", "score": "second_order"},
    }
    for label, allocate in plans.items():
        for suffix, refine in (("", []), (" + refined", [BLOCK])):
            found[f"{label} + anchored{suffix}"] = aa.with_changes(allocate=allocate, refine=refine)
    return found


def from_survey() -> list[str]:
    """Rows that are cut from the shared survey."""
    ablation = [f"select {key}" for key in KEYS]
    ablation += [f"select {key} unordered" for key in ("magnitude", "negative")]
    return ["survey", *ablation, *(f"knapsack {score}" for score in SCORES)]


def shared_survey(calibration: Tensor, place: Path) -> Survey:
    """The survey behind the rows that only differ in their ranks; made once."""
    if is_survey(place):
        return load_survey(place)
    loaded = load_model(MODEL)
    recipe = get_recipe("zs-svd").with_changes(refine=[])
    started = time.process_time()
    job = open_job(loaded, recipe, text=calibration)
    made = make_survey(job, scores=SCORES[1:], complete=True)
    facts = {**made.facts, "cpu_seconds": round(time.process_time() - started, 1)}
    made = replace(
        made,
        key=survey_key(loaded, recipe, job.windows),
        model_name=loaded.name,
        other_bytes=other_bytes(loaded.model, job.anatomy, loaded.stored_dtype),
        facts=facts,
    )
    save_survey(made, place)
    return made


def kept_components(name: str, keep: float, survey: Survey) -> dict[str, Tensor | None]:
    """Which components of every target a row keeps; None for a dense target."""
    kind, *words = name.split()
    if kind == "knapsack":
        plan = plan_from_survey(survey, keep=keep, rule="knapsack", score=words[0])
        return {e.name: None if e.rank is None else torch.arange(e.rank) for e in plan.entries}
    chosen = select(
        survey.curves, keep=keep, limits=LIMITS, key=words[0], ordered="unordered" not in words
    )
    kept = chosen.kept
    whole = [c.rank for c in survey.curves]
    return {
        c.name: None if len(k) == r else torch.as_tensor(k)
        for c, k, r in zip(survey.curves, kept, whole, strict=True)
    }


def cut(model: nn.Module, survey: Survey, kept: dict[str, Tensor | None]) -> float:
    """Replace the targets in place; returns the kept fraction of their numbers."""
    stored = dense = 0
    for name, components in kept.items():
        original = get_module(model, name)
        W = read_weight(original)
        dense += W.numel()
        if components is None:
            stored += W.numel()
            continue
        factors = load_factors(survey, name)
        up, down = factors.up[:, components], factors.down[components]
        stored += up.numel() + down.numel()
        options = {"dtype": W.dtype, "device": W.device}
        layer = LowRankLinear.from_factors(up, down, read_bias(original), **options)
        replace_module(model, name, layer)
    return stored / dense


def run_row(name: str, keep: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress and evaluate in this process."""
    torch.set_num_threads(1)
    windows = arguments.eval_windows
    calibration, evaluation = read_windows(arguments.token_cache, windows)
    facts: dict[str, Any] = {"row": name, "keep": keep, "eval_windows": windows}
    loaded = load_model(MODEL)
    survey = shared_survey(calibration, arguments.survey) if name in from_survey() else None
    started = time.process_time()
    if name in recipes():
        recipe = recipes()[name].with_changes(keep=keep)
        outcome = run_recipe(loaded, recipe, text=calibration)
        facts["kept"] = outcome.plan.achieved_keep
        facts["dense_targets"] = sum(e.rank is None for e in outcome.plan.entries)
        facts["recipe_hash"] = outcome.recipe.hash()
        facts["seconds"] = {k: round(v, 1) for k, v in outcome.report["seconds"].items()}
        facts["notes"] = outcome.report["notes"]
    elif survey is not None and name != "survey":
        kept = kept_components(name, keep, survey)
        facts["dense_targets"] = sum(c is None for c in kept.values())
        facts["kept"] = cut(loaded.model, survey, kept)
        loaded.model.to(loaded.stored_dtype)
    facts["cpu_seconds"] = round(time.process_time() - started, 1)
    facts["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if name == "survey" and survey is not None:
        return {**facts, "nll": float("nan"), "cpu_seconds": survey.facts["cpu_seconds"]}
    result = perplexity(loaded.model.float(), evaluation, batch=16)
    return {
        **facts,
        "nll": result.nll,
        "perplexity": result.perplexity,
        "nll_standard_error": result.nll_standard_error,
    }


def measure(arguments: argparse.Namespace) -> None:
    """Run what is missing, one process per row, and write the results after each."""
    fill_cache(arguments)
    names = [n for n in (*recipes(), *from_survey()) if n != "survey"]
    wanted = [("dense", 1.0)]
    wanted += [(n, k) for n in names for k in arguments.keeps if re.search(arguments.only, n)]
    if any(name in from_survey() for name, _ in wanted):
        wanted.insert(1, ("survey", 1.0))
    windows = arguments.eval_windows
    for name, keep in wanted:
        known = read_results(arguments.output)
        if any((r["row"], r["keep"], r["eval_windows"]) == (name, keep, windows) for r in known):
            continue
        command = [sys.executable, __file__, "--row", name, "--keeps", str(keep)]
        command += ["--token-cache", str(arguments.token_cache), "--eval-windows", str(windows)]
        command += ["--survey", str(arguments.survey)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        known.append({k: v for k, v in row.items() if v == v})
        content = {"environment": environment(), "rows": known}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        show([r for r in known if r["row"] != "survey"], windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--token-cache", type=Path, default=TOKEN_CACHE)
    parser.add_argument("--survey", type=Path, default=SURVEY, help="where the shared survey lies")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--eval-windows", type=int, default=EVALUATION)
    parser.add_argument("--show", action="store_true", help="print the results and run nothing")
    parser.add_argument("--row", help="run one row in this process and print it as JSON")
    arguments = parser.parse_args()
    if arguments.show:
        known = read_results(arguments.output)
        show([r for r in known if r["row"] != "survey"], arguments.eval_windows)
    elif arguments.row is not None:
        print(json.dumps(run_row(arguments.row, arguments.keeps[0], arguments)))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

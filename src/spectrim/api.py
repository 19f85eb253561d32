"""The Python interface; the command line says the same with the same words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.allocate.budget import parse_size
from spectrim.allocate.plan import Plan
from spectrim.errors import BudgetError, InputError
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.compress import Outcome, run_recipe
from spectrim.run.evaluating import evaluate_model
from spectrim.run.job import Progress
from spectrim.run.loading import load_model
from spectrim.run.saving import save_outcome
from spectrim.run.texts import UserText
from spectrim.storage.atomic import check_output

__all__ = ["Result", "compress", "evaluate", "export", "inspect", "resolve_recipe"]

DEFAULT_RECIPE = "svd-llm"


@dataclass
class Result(Outcome):
    """A compressed model, its plan, recipe and report, and the folder it was saved to."""

    output: Path | None = None


def resolve_recipe(
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    keep: float | None = None,
    seed: int | None = None,
    text: UserText = None,
    windows: int | None = None,
    window_length: int | None = None,
    storage: str | None = None,
    weights: str | None = None,
) -> Recipe:
    """A recipe with the user's changes, validated.

    Raises:
        RecipeError: an unknown recipe or a value outside its range.
    """
    chosen = get_recipe(recipe)
    if keep is not None and not 0 < keep <= 1:
        raise BudgetError(f"keep is {keep}; it is a fraction in (0, 1], for example 0.6")
    calibration: dict[str, Any] = {"windows": windows, "window_length": window_length}
    if isinstance(text, (str, Path)):
        parts = [part.strip() for part in str(text).split(",")]
        calibration["text"] = parts[0] if len(parts) == 1 else parts
    elif text is not None:
        calibration["text"] = f"({type(text).__name__})"
    changes: dict[str, Any] = {
        "calibration": {k: v for k, v in calibration.items() if v is not None},
        "storage": {
            k: v for k, v in {"kind": storage, "weights": weights}.items() if v is not None
        },
    }
    if keep is not None:
        changes["keep"] = keep
    if seed is not None:
        changes["seed"] = seed
    return chosen.with_changes(**changes)


def compress(
    model: str | Path | nn.Module,
    *,
    keep: float | None = None,
    size: str | int | None = None,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    text: UserText = None,
    windows: int | None = None,
    window_length: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    plan: Plan | str | Path | None = None,
    storage: str | None = None,
    weights: str | None = None,
    tokenizer: Any = None,
    offload_streams: str | Path | None = None,
    on_failure: str = "error",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Result:
    """Compress a model and, with `output`, save it as an ordinary Hugging Face folder.

    Args:
        model: a hub name, a folder, or a loaded causal language model, which is changed in place.
        keep: fraction of the bytes of the target linear layers that remains, in (0, 1].
        size: instead of keep, the size of the whole checkpoint: bytes or "3.5GB".
        recipe: a preset's name, a YAML file, or a `Recipe`.
        text: calibration text: source name, file, several separated by commas, list of documents,
            or a token tensor (N, T) whose rows are the windows. None for the recipe's.
        windows: number of calibration windows.
        window_length: tokens per window.
        seed: of everything random in the run.
        device: `auto`, or a torch device.
        dtype: to work in; `auto` is fp32 on a CPU and the checkpoint's elsewhere. The result is
            stored in the checkpoint's dtype.
        output: folder to write; it must not exist or be empty.
        overwrite: replace an existing output folder.
        plan: ranks to use instead of the recipe's rule: a `Plan` or its JSON file.
        storage: `factored`, `packed` or `auto`.
        weights: `native`, `int8` or `int4`.
        tokenizer: for model objects.
        offload_streams: folder for hidden states that should not be held in memory.
        on_failure: `error`, or `keep-unrefined` to keep a block whose refinement diverged.
        progress: told of stages and steps.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        SpectrimError: every refusal; nothing is left half-written.
    """
    if keep is not None and size is not None:
        raise BudgetError("keep and size exclude each other; give one")
    if on_failure not in ("error", "keep-unrefined"):
        raise InputError(f"on_failure is {on_failure!r}; use error or keep-unrefined")
    resolved = resolve_recipe(
        recipe,
        keep=keep,
        seed=seed,
        text=text,
        windows=windows,
        window_length=window_length,
        storage=storage,
        weights=weights,
    )
    if output is not None:
        check_output(output, overwrite=overwrite)
    goal = parse_size(size) if isinstance(size, str) else size
    loaded = load_model(
        model,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    outcome = run_recipe(
        loaded,
        resolved,
        text=None if isinstance(text, (str, Path)) else text,
        size=goal,
        plan=_read_plan(plan),
        progress=progress,
        offload_streams=None if offload_streams is None else Path(offload_streams),
        on_failure=on_failure,
    )
    result = Result(**vars(outcome))
    if output is not None:
        save_outcome(result, output, overwrite=overwrite)
        result.output = Path(output)
    return result


def _read_plan(plan: Plan | str | Path | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    import json

    try:
        return Plan.from_json(json.loads(Path(plan).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{plan} is not a plan written by `spectrim plan`: {error}") from error


def evaluate(model: str | Path | nn.Module, **options: Any) -> dict[str, Any]:
    """Perplexity with its protocol, parameters and bytes; see `run.evaluating.evaluate_model`."""
    return evaluate_model(model, **options)


def export(folder: str | Path, *, output: str | Path, overwrite: bool = False) -> Path:
    """Write a compressed folder as ordinary dense weights for every other tool."""
    from spectrim.storage.dense import export_dense

    return export_dense(folder, output, overwrite=overwrite)


def inspect(folder: str | Path) -> dict[str, Any]:
    """Ranks, shapes and bytes of a folder from its headers alone."""
    from spectrim.storage.inspect import inspect_folder

    return inspect_folder(folder).summary()

"""Zero-shot tasks through lm-eval as a library, with standard errors; a missing task is skipped.

The seven tasks are those that the low-rank literature reports (SVD-LLM, arXiv 2403.07378, and
after it). Accuracy is of the unnormalized log-likelihood, as in its tables; the one normalized by
length is recorded beside it. A task whose data cannot be fetched does not end the evaluation: the
result says what is missing and how to give it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from spectrim.errors import InputError, MissingExtraError

LITERATURE_TASKS = (
    "openbookqa",
    "arc_easy",
    "arc_challenge",
    "winogrande",
    "hellaswag",
    "piqa",
    "mathqa",
)
OFFLINE_TASKS = (
    "spectrim_agreement",
    "spectrim_articles",
    "spectrim_tense",
    "spectrim_word_order",
)
_SETS = {"literature": LITERATURE_TASKS, "offline": OFFLINE_TASKS}

REMEDY = (
    "connect to the hub, fill its cache, or give a folder with a task file of this name that "
    "reads local files (--task-folder)"
)

TASK_FOLDER = Path(__file__).parent / "tasks"
"""Our own task files; `lm-eval --include_path` takes it."""

logger = logging.getLogger(__name__)


@dataclass
class ZeroShot:
    """Accuracies and their standard errors.

    Attributes:
        tasks: task -> `accuracy`, `standard_error`, `normalized` (or None), `samples`, `version`.
        skipped: task -> why it was not measured.
        protocol: shots, limit, batch, BOS and versions.
        right: task -> question -> whether it was answered right; for paired differences.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    right: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean accuracy over the measured tasks; None if there are none."""
        found = [task["accuracy"] for task in self.tasks.values()]
        return sum(found) / len(found) if found else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean, the tasks being independent."""
        errors = [task["standard_error"] for task in self.tasks.values()]
        if not errors or any(error is None for error in errors):
            return None
        return math.sqrt(sum(error**2 for error in errors)) / len(errors)

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "tasks": self.tasks,
            "mean": self.mean,
            "mean_standard_error": self.standard_error,
            "skipped": self.skipped,
            "protocol": self.protocol,
        }


def task_difference(model: ZeroShot, reference: ZeroShot) -> dict[str, Any]:
    """Accuracy minus that of a reference on the same questions, with paired standard errors.

    What makes a question hard for both models cancels: the error is that of the mean of the single
    differences (-1, 0 or 1), not of two independent accuracies.

    Returns:
        `tasks`: task -> `accuracy`, `standard_error` and `questions`; `mean` and
        `mean_standard_error` over these tasks. Tasks that only one of them has are left out.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for name, ours in model.right.items():
        theirs = reference.right.get(name, {})
        if not ours or ours.keys() != theirs.keys():
            continue
        count = len(ours)
        pairs = [ours[question] - theirs[question] for question in ours]
        mean = math.fsum(pairs) / count
        spread = math.fsum((pair - mean) ** 2 for pair in pairs)
        error = math.sqrt(spread / (count - 1) / count) if count > 1 else None
        tasks[name] = {"accuracy": mean, "standard_error": error, "questions": count}
    errors = [task["standard_error"] for task in tasks.values()]
    known = bool(errors) and None not in errors
    return {
        "tasks": tasks,
        "mean": math.fsum(t["accuracy"] for t in tasks.values()) / len(tasks) if tasks else None,
        "mean_standard_error": math.sqrt(math.fsum(e**2 for e in errors)) / len(errors)
        if known
        else None,
    }


def task_names(tasks: Sequence[str]) -> list[str]:
    """Names with `literature` and `offline` replaced by their members, without repetition."""
    names = [name for task in tasks for name in _SETS.get(task, (task,))]
    return list(dict.fromkeys(names))


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = LITERATURE_TASKS,
    *,
    limit: int | None = None,
    batch: int = 8,
    bos: bool = False,
    task_folders: Sequence[str | Path] = (),
) -> ZeroShot:
    """Evaluate a loaded model on tasks of lm-eval.

    Args:
        model: a Hugging Face causal language model, compressed or not.
        tokenizer: its tokenizer.
        tasks: names that lm-eval knows, ours (`OFFLINE_TASKS`), or the sets `literature` and
            `offline`.
        limit: questions per task, None for all.
        batch: requests per forward pass.
        bos: put BOS before every request; False leaves that to the tokenizer.
        task_folders: folders with task files of the user's own; a task there takes the place of
            the one that lm-eval brings.

    Raises:
        MissingExtraError: lm-eval is absent.
        InputError: a name that no task has, a folder that is none, no questions, no tokenizer.
    """
    try:
        from lm_eval.models import huggingface
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval", "zero-shot evaluation") from error
    names = task_names(tasks)
    if tokenizer is None:
        raise InputError(f"the tasks {', '.join(names)} are text; the model has no tokenizer")
    absent = [str(folder) for folder in task_folders if not Path(folder).is_dir()]
    if absent:
        raise InputError(f"the task folder {absent[0]} does not exist or is no folder")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} leaves no questions; give at least 1")
    manager = task_manager(names, [TASK_FOLDER, *(Path(f) for f in task_folders)])
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise InputError(
            f"no task is called {unknown[0]!r}; `spectrim lm-eval ls tasks` lists them, "
            f"`offline` stands for {', '.join(OFFLINE_TASKS)}"
        )
    # Registered by decorators that hide the signature from type checkers.
    wrapped = _wrapped(huggingface.HFLM, model, tokenizer, batch, bos)
    result = ZeroShot(protocol=_protocol(model, limit, batch, bos))
    training = model.training
    model.eval()
    try:
        for name in names:
            _add(result, name, wrapped, manager, limit)
    finally:
        model.train(training)
    return result


def _wrapped(wrap: Any, model: Any, tokenizer: Any, batch: int, bos: bool) -> Any:
    """The model as lm-eval asks it."""
    device = str(next(model.parameters()).device)
    more = {"add_bos_token": True} if bos else {}
    wrapped = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=device, **more)
    if os.environ.get("TQDM_DISABLE") == "1":  # which lm-eval overrules unless it is told
        wrapped.loglikelihood = partial(wrapped.loglikelihood, disable_tqdm=True)
    return wrapped


def task_manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """lm-eval's index of tasks.

    Its own thousands of files take a quarter of a minute to read, so they are left out where the
    folders hold everything.
    """
    from lm_eval.tasks import TaskManager

    paths: list[str | Path] = list(folders)
    manager = TaskManager(include_path=paths, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=paths)


def _add(result: ZeroShot, name: str, model: Any, manager: Any, limit: int | None) -> None:
    """Measure one task, or note why not."""
    import lm_eval
    from jinja2 import TemplateError

    # What a task file and its data do to each other: names that no row has, choices that are none.
    misfits = (TemplateError, KeyError, TypeError, SyntaxError)
    simple_evaluate: Any = lm_eval.simple_evaluate
    try:
        # Building a task fetches its data and tries its templates on one row.
        loaded = manager.load_task_or_group([name])
    except (OSError, ValueError, ImportError) as error:
        # Hub, cache, disk and loading scripts: all of them mean that the data is not here.
        _skip(result, name, f"the data of {name!r} cannot be fetched ({_words(error)}); {REMEDY}")
        return
    except misfits as error:
        _skip(result, name, f"the task file of {name!r} does not fit its data ({_words(error)})")
        return
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(loaded.values()),
            task_manager=manager,
            limit=limit,
            # Accuracies get their error from a formula; 0 would switch that off too.
            bootstrap_iters=100,
            log_samples=True,
        )
    except (*misfits, ValueError) as error:
        # A later row that does not fit ends this task; the others still get their numbers.
        _skip(result, name, f"the task {name!r} failed on its data ({_words(error)})")
        return
    assert found is not None  # only ranks other than the first get nothing
    for task, values in found["results"].items():
        if "acc,none" not in values:
            result.skipped[task] = f"{task!r} reports no accuracy, only {', '.join(values)}"
            continue
        result.tasks[task] = _facts(values, found, task)
        of = result.tasks[task]
        logger.info("%s: %.1f %% of %s questions", task, 100 * of["accuracy"], of["samples"])
        rows = found.get("samples", {}).get(task, [])
        result.right[task] = {row["doc_id"]: float(row["acc"]) for row in rows}


def _skip(result: ZeroShot, name: str, reason: str) -> None:
    result.skipped[name] = reason
    logger.warning("%s", reason)


def _words(error: Exception) -> str:
    """Kind and first line of an error that another library raised."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def _facts(values: dict[str, Any], found: dict[str, Any], task: str) -> dict[str, Any]:
    samples = found.get("n-samples", {}).get(task, {}).get("effective")
    accuracy = float(values["acc,none"])
    error = values.get("acc_stderr,none")
    if not isinstance(error, int | float) or math.isnan(error):
        error = None
    normalized = values.get("acc_norm,none")
    return {
        "accuracy": accuracy,
        "standard_error": None if error is None else float(error),
        "normalized": None if normalized is None else float(normalized),
        "samples": samples,
        "version": found.get("versions", {}).get(task),
    }


def _protocol(model: Any, limit: int | None, batch: int, bos: bool) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "lm_eval": version("lm-eval"),
        "shots": "as each task file says (0 for the literature's)",
        "limit": limit,
        "batch": batch,
        "bos": "each" if bos else "as the tokenizer does",
        "dtype": str(model.dtype).removeprefix("torch."),
        "accuracy": "unnormalized log-likelihood",
    }

"""Train what compression left: a saved result, on any text, with a held-out choice of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spectrim.errors import ModelError
from spectrim.layers.layout import layout_of
from spectrim.layers.swap import compressed_layers
from spectrim.model.tail import Tail, blocks_in_sequence
from spectrim.model.weights import cast_parameters
from spectrim.recipe import Calibration
from spectrim.refine.course import Course, hold_out
from spectrim.refine.fitting import FitSettings
from spectrim.refine.lora import LoraTraining, recover, require_peft
from spectrim.refine.tuning import tune
from spectrim.run.loading import LoadedModel
from spectrim.run.log import RunLog
from spectrim.run.options import RunOptions
from spectrim.run.progress import Progress
from spectrim.run.texts import UserText, gather_windows
from spectrim.run.thinness import seen_notes
from spectrim.storage.folder import REPORT_FILE
from spectrim.storage.json_file import read_json

STAGE = "heal"


@dataclass(frozen=True)
class Healing:
    """How to train.

    Attributes:
        parts: `factors` trains all numbers of all compressed layers; `lora` adapters on one part
            of each after the other, merged without loss.
        steps: at most; of each stage where there are two.
        batch: windows per step.
        learning_rate: peak: for factors a share of each tensor's root mean square.
        held_out: share of windows that choose the step.
        judge_every: steps between two judgements.
        patience: judgements in a row without a better state after which training ends.
        rank: of the adapters.
        seed: of windows, order and adapters.
    """

    parts: Literal["factors", "lora"] = "factors"
    steps: int = 200
    batch: int = 8
    learning_rate: float | None = None
    held_out: float = 0.125
    judge_every: int = 20
    patience: int = 3
    rank: int = 8
    seed: int = 0

    def settings(self) -> FitSettings:
        """For all factors."""
        return FitSettings(
            steps=self.steps,
            judge_every=min(self.judge_every, self.steps),
            batch=self.batch,
            micro_batch=min(self.batch, 4),
            learning_rate=self.learning_rate or 0.005,
            final_learning_rate=0.0,
            weight_decay=0.0,
            warmup=0.1,
            clip=1.0,
            seed=self.seed,
            relative=True,
            patience=self.patience,
        )

    def adapters(self, windows: int, stage: int) -> LoraTraining:
        """For one stage of adapters on so many training windows."""
        per_epoch = -(-windows // self.batch)
        return LoraTraining(
            rank=self.rank,
            alpha=2 * self.rank,
            learning_rate=self.learning_rate or 5e-4,
            epochs=max(1, self.steps // per_epoch),
            batch=self.batch,
            micro_batch=min(self.batch, 4),
            seed=self.seed + stage,
            patience=self.patience,
        )


@dataclass
class Healed:
    """A trained result in memory.

    Attributes:
        model: with its parameters in the stored dtype.
        tokenizer: its own.
        report: the result's report, continued: its `healing` has one entry per training.
    """

    model: Any
    tokenizer: Any
    report: dict[str, Any]
    output: Path | None = field(default=None)


def heal_model(
    loaded: LoadedModel,
    calibration: Calibration,
    healing: Healing,
    options: RunOptions = RunOptions(),
    *,
    text: UserText = None,
    teacher: LoadedModel | None = None,
) -> Healed:
    """Train a loaded result in place.

    Args:
        loaded: a result of spectrim, by its folder.
        calibration: sources, number and length of windows.
        healing: how to train.
        options: whether the user asked for the windows' length, and who is told of judgements.
        text: the user's own text, None for the calibration's sources.
        teacher: the original, whose next-token distribution is then the aim instead of the text.

    Raises:
        ModelError: nothing compressed, coded weights, or a teacher with another vocabulary.
        ArtifactError: the result has no report to continue.
        MissingExtraError: adapters without PEFT.
        TextError, InputError: too little text.
        NonFiniteError: the training diverged.
    """
    layers, lora = _trainable(loaded), healing.parts == "lora"
    if lora:
        require_peft("healing by adapters")
    report = read_json(Path(loaded.name) / REPORT_FILE)
    windows = gather_windows(loaded, calibration, text, seed=healing.seed, exactly=options.exactly)
    train, held = hold_out(len(windows), healing.held_out)
    own, other = _tails(loaded, teacher, windows.ids)
    log, progress, stages = RunLog(), options.progress, _stages(layers) if lora else [[]]
    progress.start(STAGE, -(-healing.steps // healing.judge_every) * len(stages))
    course = Course(train, held, windows.ids.shape[1], partial(_judged, progress))
    fits = []
    with log.timed(STAGE):
        for number, chosen in enumerate(stages):
            if lora:
                training = healing.adapters(len(train), number)
                made = recover(own, chosen, windows.ids, course, training, teacher=other)
            else:
                parameters = [p for layer in layers.values() for p in layer.parameters()]
                made = tune(own, parameters, windows.ids, course, healing.settings(), teacher=other)
            fits.append(made)
    progress.finish(STAGE)
    cast_parameters(loaded.model, loaded.stored_dtype)
    entry = {
        **asdict(healing),
        "loss": "next token" if teacher is None else f"divergence from {teacher.name}",
        "text": windows.record(),
        "held_out_windows": len(held),
        "notes": seen_notes(windows.ids[held], windows.ids[train]),
        "before": fits[0].before,
        "after": fits[-1].after,
        "stages": [asdict(one) for one in fits],
        "seconds": log.stages[STAGE],
    }
    return Healed(loaded.model, loaded.tokenizer, _continued(report, entry))


def _judged(progress: Progress, step: int, loss: float) -> None:
    progress.advance(STAGE, f"step {step}: {loss:.4f} nats per token")


def _trainable(loaded: LoadedModel) -> dict[str, Any]:
    """The compressed layers, all of native numbers.

    Raises:
        ModelError: there are none, or some have coded weights.
    """
    layers = compressed_layers(loaded.model)
    if not layers:
        raise ModelError(f"{loaded.name} holds no layer compressed by spectrim; nothing to heal")
    rounded = {name: layer for name, layer in layers.items() if layer.weights != "native"}
    if rounded:
        name, layer = next(iter(rounded.items()))
        raise ModelError(
            f"{len(rounded)} of {len(layers)} layers of {loaded.name} have coded weights ({name} "
            f"{layer.weights}), which do not train; heal a result in native numbers, or train a "
            "PEFT adapter beside the codes"
        )
    return layers


def _stages(layers: Mapping[str, Any]) -> list[list[tuple[Any, str]]]:
    """Layers and the part that gets an adapter: never both factors of a product at once."""
    readers = [(layer, layer.reader[0]) for layer in layers.values()]
    others = []
    for layer, reader in readers:
        (other,) = set(layout_of(layer.storage).formats) - {reader}
        others.append((layer, other))
    return [readers, others]


def _tails(
    loaded: LoadedModel, teacher: LoadedModel | None, ids: Tensor
) -> tuple[Tail, Tail | None]:
    """Of the model, and of its teacher where it has one.

    Raises:
        ModelError: the teacher has another vocabulary.
    """
    own, other = _tail(loaded, ids), None if teacher is None else _tail(teacher, ids)
    if teacher is not None and other is not None and own.vocabulary != other.vocabulary:
        raise ModelError(
            f"{teacher.name} has {other.vocabulary} tokens and {loaded.name} {own.vocabulary}; "
            "only a model of the same vocabulary can teach"
        )
    return own, other


def _tail(loaded: LoadedModel, ids: Tensor) -> Any:
    names = blocks_in_sequence(loaded.model, ids[:1].to(loaded.device))
    return Tail.find(loaded.model, names, ids.to(loaded.device))


def _continued(report: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A result's report with the training added; what it measured before holds no longer."""
    measured = report.get("measured")
    why_not = "trained after it was measured; `spectrim evaluate` measures it again"
    told = [*report.get("healing", []), {**entry, "measured_before": measured}]
    report |= {"measured": {"texts": [], "why_not": why_not}, "healing": told}
    aim = "" if entry["loss"] == "next token" else f", {entry['loss']}"
    report["notes"] = [
        *report.get("notes", []),
        f"healed ({entry['parts']}{aim}) on {', '.join(entry['text']['sources'])}: "
        f"{entry['before']:.4f} -> {entry['after']:.4f} nats per token on "
        f"{entry['held_out_windows']} held-out windows; errors of single layers are those before",
    ]
    return report

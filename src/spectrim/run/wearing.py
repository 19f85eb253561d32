"""A LoRA folder put on a loaded model, once it is known to be for that model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.refine.lora import require_peft
from spectrim.run.loading import LoadedModel
from spectrim.storage.adapter import PREFIX, RECORD_FILE, WEIGHT_FILE
from spectrim.storage.headers import read_header
from spectrim.storage.json_file import read_json

PURPOSE = "putting an adapter on a model"


def check_adapter(folder: str | Path) -> None:
    """Refuse what is no adapter, before anything is loaded.

    Raises:
        MissingExtraError: PEFT is not installed.
        ModelError: no LoRA folder.
    """
    require_peft(PURPOSE)
    for file in ("adapter_config.json", WEIGHT_FILE):
        if not (Path(folder) / file).is_file():
            raise ModelError(f"{folder} is no LoRA folder: it has no {file}")


def wearing(loaded: LoadedModel, folder: str | Path) -> LoadedModel:
    """The model with an adapter beside its layers, which compute `W x + scaling · B A x`.

    The model object is changed: PEFT puts its own layers around those that get an adapter.

    Args:
        loaded: dense or compressed.
        folder: a LoRA folder, of `spectrim adapter` or of PEFT.

    Raises:
        MissingExtraError: PEFT is not installed.
        ModelError: no LoRA folder, or one for another model.
        ArtifactError: a damaged file.
    """
    peft: Any = require_peft(PURPOSE)
    folder = Path(folder)
    check_adapter(folder)
    _check_base(loaded, folder)
    _check_layers(loaded, folder)
    worn = peft.PeftModel.from_pretrained(loaded.model, str(folder)).get_base_model()
    return replace(loaded, model=worn.eval())


def _check_base(loaded: LoadedModel, folder: Path) -> None:
    """Refuse an adapter of ours that was computed for other weights.

    Raises:
        ModelError: it was.
    """
    if not (folder / RECORD_FILE).is_file():
        return
    working = next(loaded.model.parameters()).dtype
    if torch.finfo(working).eps > torch.finfo(loaded.stored_dtype).eps:
        return  # weights read in fewer bits than they are stored in cannot be recognized
    record = read_json(folder / RECORD_FILE)
    if record.get("base_identity") not in (None, loaded.identity()):
        raise ModelError(
            f"{folder} was made for {record.get('base')}, whose weights are not those of "
            f"{loaded.name}: it holds the difference to that model alone; make one for this with "
            "spectrim adapter"
        )


def _check_layers(loaded: LoadedModel, folder: Path) -> None:
    """Refuse an adapter of layers that the model lacks, which PEFT would load in part.

    Raises:
        ModelError: names the first such layer, or the first shape that does not fit.
    """
    modules = dict(loaded.model.named_modules())
    for key, entry in read_header(folder / WEIGHT_FILE).items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        module = modules.get(name)
        if module is None:
            raise ModelError(
                f"{folder} adapts {name}, and {loaded.name} has no such layer: it is the adapter "
                "of another model"
            )
        out_features, in_features = _features(module)
        side, needed = (1, in_features) if part == "A.weight" else (0, out_features)
        if len(entry.shape) != 2 or entry.shape[side] != needed:
            raise ModelError(
                f"{folder} has {key} {entry.shape} for a layer ({out_features}, {in_features}) of "
                f"{loaded.name}: it is the adapter of another model"
            )


def _features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer, dense or compressed; transformers' `Conv1D` names them nx and nf."""
    of: Any = module
    if hasattr(of, "nf"):
        return of.nf, of.nx
    return getattr(of, "out_features", 0), getattr(of, "in_features", 0)

"""The weight files of a model folder: which they are, and that they are safetensors inside it."""

from __future__ import annotations

import re
from pathlib import Path

from spectrim.errors import ArtifactError, ModelError, SpectrimError
from spectrim.storage.json_file import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,200}\.safetensors", re.ASCII)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in order; all of them exist.

    Raises:
        ArtifactError: there are none, one is missing, or the index names something that is not
            a plain file name.
        ModelError: there are only pickled ones.
    """
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if single.is_file():  # the one that transformers loads, whatever an index says
        return [single]
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index} has no weight_map")
    names = set()
    for name in weight_map.values():
        # A name from a file must not lead out of the folder.
        if not isinstance(name, str) or not WEIGHT_FILE_NAME.fullmatch(name):
            raise ArtifactError(
                f"{index} names {str(name)[:200]!r}, which is not the name of a safetensors file"
            )
        names.add(name)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ArtifactError(f"{folder} lacks {missing[0]!r}, one of {len(names)} weight files")
    return [folder / name for name in sorted(names)]


def _no_weights(folder: Path) -> SpectrimError:
    """What to say of a folder without safetensors."""
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    pickled = [name for name in found if name.endswith(PICKLES)]
    if not pickled:
        return ArtifactError(
            f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; spectrim reads "
            "safetensors only"
        )
    return ModelError(
        f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE} but {pickled[0]!r}: pickled "
        "weights can run code while they are read, and spectrim never reads them. If you trust "
        "them, convert them once: AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(new_folder)"
    )

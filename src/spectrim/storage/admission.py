"""What a model folder must be before transformers is allowed to load it.

transformers opens whatever an index names, takes pickles where it finds no safetensors, builds as
many layers as a configuration asks for, and reports a damaged file without its name. All of that
is settled here, from the configuration and the headers, before a weight is read. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrim.errors import ArtifactError
from spectrim.storage.headers import read_header
from spectrim.storage.json_file import read_json
from spectrim.storage.weight_files import checkpoint_files

MOST_MODULES = 20_000
"""Blocks, or experts of a block, that a configuration may ask for."""

_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)


def admit_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be loaded, or not safely.

    Raises:
        ModelError: pickled weights only.
        ArtifactError: a damaged or truncated file, or a name that leads out of the folder; names
            the file and, where one is to blame, the tensor.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("transformers_weights") is not None:
        raise ArtifactError(
            f"{folder / 'config.json'} names its own weight file (transformers_weights), which "
            "spectrim does not follow; rename the file to model.safetensors and remove the key"
        )
    _check_counts(config, folder / "config.json")
    for file in checkpoint_files(folder):
        read_header(file)


def needs_remote_code(folder: str | Path) -> bool:
    """Whether the configuration of a folder points to Python code that comes with it."""
    path = Path(folder) / "config.json"
    return path.is_file() and "auto_map" in read_json(path)


def _check_counts(config: Mapping[str, Any], path: Path) -> None:
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    for section in (config, *nested):
        for name in _COUNTS:
            count = section.get(name)
            if isinstance(count, int) and count > MOST_MODULES:
                raise ArtifactError(
                    f"{path} asks for {name} = {count:.6g}, more than the {MOST_MODULES} that any "
                    "model has; the file is damaged"
                )

"""Export: multiply the factors out, so that every tool reads the result without spectrim."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spectrim.devices import HOST
from spectrim.errors import ArtifactError
from spectrim.storage.atomic import check_output, new_folder
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.json_file import as_json, read_json
from spectrim.storage.origin import LICENSES, read_origin

OWN_FILES = {"config.json", "generation_config.json", "recipe.yaml", "README.md"}
"""Written anew or explained by the card; tokenizer and templates are copied."""

COMPANIONS = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
"""Suffixes of what is copied: data only, neither code nor pickles."""


def export_dense(
    folder: str | Path,
    output: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write an ordinary dense model that computes what the compressed one computes.

    Products are taken in fp32 and rounded once to the dtype of the folder.

    Args:
        folder: a result of spectrim.
        output: a new or empty folder, or any model folder with `overwrite`.
        max_shard_size: of one weight file.
        overwrite: replace the model folder that is there.

    Returns:
        The folder that was written.

    Raises:
        ArtifactError: `folder` is damaged or holds no compressed model.
        OutputError: see `save_model`.
    """
    source = Path(folder)
    check_output(output, overwrite=overwrite, sources=[("the result", source)])
    if inspect_folder(source).table is None:
        raise ArtifactError(f"{source} holds no model compressed by spectrim")
    model = load_folder(source)
    model.dequantize()
    with new_folder(output, overwrite=overwrite) as destination:
        model.save_pretrained(destination, max_shard_size=max_shard_size)
        for path in sorted(source.iterdir()):
            if path.is_file() and is_companion(path.name):
                shutil.copyfile(path, destination / path.name)
        matter = {
            **read_origin(source).matter,
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
        }
        card = (
            f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n\n"
            "# Dense export\n\nOrdinary weights, multiplied out from a model compressed by "
            "spectrim. Quality is that of the compressed model, size that of the original.\n"
        )
        (destination / "README.md").write_text(card, encoding="utf-8")
    return Path(output)


def write_beside(source: Path, destination: Path, scheme: Mapping[str, Any] | None) -> None:
    """Put configuration and companions of a result beside weights of another format.

    Args:
        source: folder of the result.
        destination: of the export.
        scheme: what its configuration says of the weights, None for plain numbers.
    """
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    if scheme is not None:
        config["quantization_config"] = scheme
    (destination / "config.json").write_text(as_json(config), encoding="utf-8")
    for path in sorted(source.iterdir()):
        if path.is_file() and is_companion(path.name):
            shutil.copyfile(path, destination / path.name)


def is_companion(name: str) -> bool:
    """Whether an export copies a file of the result beside its own: data and licenses."""
    if LICENSES.fullmatch(name):
        return True
    if ".safetensors" in name or name in OWN_FILES or name.startswith(("spectrim", ".")):
        return False
    return Path(name).suffix in COMPANIONS


def load_folder(folder: Path, *, dtype: Any = "auto") -> Any:
    """The model with the class that its configuration names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or []
    known = getattr(transformers, names[0], None) if names else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        known = transformers.AutoModelForCausalLM
    return known.from_pretrained(folder, dtype=dtype, device_map=HOST.type)

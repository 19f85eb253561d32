"""Write a compressed model as an ordinary Hugging Face folder, completely or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.errors import ModelError
from spectrim.layers.swap import compressed_layers
from spectrim.storage.assemble import save_in_parts
from spectrim.storage.atomic import new_folder
from spectrim.storage.inspect import FolderInspection, inspect_folder

if TYPE_CHECKING:
    from torch import Tensor

RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "spectrim_report.json"


def save_model(
    model: Any,
    tokenizer: Any | None,
    output: str | Path,
    *,
    recipe_yaml: str,
    report: Mapping[str, Any],
    card: str,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    read: Callable[[str], Tensor] | None = None,
    companions: Sequence[Path] = (),
) -> FolderInspection:
    """Write weights, configuration, tokenizer, recipe, report and card.

    The report gains a key `stored` with the byte counts recounted from the files.

    Args:
        model: prepared by `attach`, or dense.
        tokenizer: saved beside it; None if there is none.
        output: a new or empty folder, or any model folder with `overwrite`.
        recipe_yaml: the resolved recipe.
        report: plain data without NaN or infinity.
        card: see `model_card`.
        max_shard_size: of one weight file, in bytes or as transformers spells it.
        overwrite: replace the model folder that is there.
        companions: files to copy beside them, such as the original's license.
        read: gives the tensors of the model that are on the meta device, if some are.

    Returns:
        The inspection of what was written.

    Raises:
        OutputError: the destination is taken or cannot be written; nothing is left there.
        ModelError: the model holds compressed layers but `attach` was not called.
    """
    if compressed_layers(model) and getattr(model, "hf_quantizer", None) is None:
        raise ModelError("the model holds compressed layers; call attach(model) before saving it")
    with new_folder(output, overwrite=overwrite) as folder:
        if read is None:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            save_in_parts(model, folder, read, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for path in companions:
            shutil.copyfile(path, folder / path.name)
        stored = inspect_folder(folder).summary()
        text = json.dumps({**report, "stored": stored}, indent=2, allow_nan=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        (folder / RECIPE_FILE).write_text(recipe_yaml, encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return inspect_folder(output)

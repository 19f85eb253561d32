"""Write a compressed model as an ordinary Hugging Face folder, completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.errors import ModelError
from spectrim.layers.swap import compressed_layers
from spectrim.storage.assemble import save_in_parts
from spectrim.storage.atomic import new_folder
from spectrim.storage.inspect import FolderInspection, inspect_folder
from spectrim.storage.json_file import as_json

if TYPE_CHECKING:
    from torch import Tensor

RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "spectrim_report.json"


@dataclass(frozen=True)
class Papers:
    """What lies beside the weights of a result.

    Attributes:
        recipe_yaml: the resolved recipe.
        report: plain data without NaN or infinity.
        card: Markdown, see `storage/card.py`.
        companions: files to copy, such as the original's license.
    """

    recipe_yaml: str
    report: Mapping[str, Any]
    card: str
    companions: Sequence[Path] = ()

    def write(self, folder: Path, **more: Any) -> None:
        """Put them into a folder; `more` are further keys of the report.

        Raises:
            ValueError: the report is no JSON.
        """
        for path in self.companions:
            shutil.copyfile(path, folder / path.name)
        texts = {REPORT_FILE: as_json({**self.report, **more}), RECIPE_FILE: self.recipe_yaml}
        for name, text in {**texts, "README.md": self.card}.items():
            (folder / name).write_text(text, encoding="utf-8")


def save_model(
    model: Any,
    tokenizer: Any | None,
    output: str | Path,
    papers: Papers,
    *,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    read: Callable[[str], Tensor] | None = None,
) -> FolderInspection:
    """Write weights, configuration and tokenizer with their papers.

    The report gains a key `stored` with the byte counts recounted from the files.

    Args:
        model: prepared by `attach`, or dense.
        tokenizer: saved beside it; None if there is none.
        output: a new or empty folder, or any model folder with `overwrite`.
        papers: what lies beside the weights.
        max_shard_size: of one weight file, in bytes or as transformers spells it.
        overwrite: replace the model folder that is there.
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
        papers.write(folder, stored=inspect_folder(folder).summary())
    return inspect_folder(output)

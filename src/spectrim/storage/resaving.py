"""What a loaded result can do beyond what transformers lets a quantised model do.

It is cast by `half` and `float`, which transformers refuses; and saved again it takes its report,
recipe, card and licenses along. `save_pretrained` tells a quantizer nothing of the folder, so the
model carries methods of its own, which call those of its classes; copies of it have their own.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.layers.swap import compressed_layers
from spectrim.storage.folder import RECIPE_FILE, REPORT_FILE
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.json_file import as_json, read_json
from spectrim.storage.origin import read_origin

CARD = "README.md"


def take_casts(model: Any) -> None:
    """Let a model with compressed layers be cast; scales of coded weights keep their dtype."""
    model.half = partial(nn.Module.half, model)
    model.float = partial(nn.Module.float, model)


def take_along(model: Any) -> None:
    """Let every later `save_pretrained` of a loaded result write its companions too."""
    model.save_pretrained = _SavesCompanions(model)


class _SavesCompanions:
    """Stands for `model.save_pretrained`."""

    def __init__(self, model: Any):
        self.model = model
        self.source = str(model.name_or_path)

    def __call__(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; files that lie there already stay as they are."""
        type(self.model).save_pretrained(self.model, save_directory, *arguments, **options)
        folder = Path(save_directory)
        if not compressed_layers(self.model) or not (folder / "config.json").is_file():
            return  # multiplied out, or another process of several writes
        taken = _copy_companions(self.source, folder)
        if REPORT_FILE in taken:
            dtype = str(self.model.dtype).removeprefix("torch.")
            _recount(folder, dtype=dtype, card=folder / CARD if CARD in taken else None)


def _copy_companions(source: str, folder: Path) -> tuple[str, ...]:
    """Copy what is there to copy and not there yet; the names of all that is the result's."""
    found = [_companion(source, name) for name in (REPORT_FILE, RECIPE_FILE, CARD)]
    files = [path for path in found if path is not None]
    files += read_origin(source).files if files else ()
    taken = []
    for path in files:
        target = folder / path.name
        if target.exists() and not target.samefile(path):
            continue
        if not target.exists():
            shutil.copyfile(path, target)
        taken.append(path.name)
    return tuple(taken)


def _companion(source: str, name: str) -> Path | None:
    """A file of a folder, or of a hub name as far as it can be had."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    missing_is_fine = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    found = cached_file(source, name, **missing_is_fine)
    return None if found is None else Path(found)


def _recount(folder: Path, *, dtype: str, card: Path | None) -> None:
    """The report counts the bytes that are there now; where they differ, it and the card say so."""
    report = read_json(folder / REPORT_FILE)
    before, now = report.get("stored"), inspect_folder(folder).summary()
    if before == now:
        return
    report["stored"] = now
    note = (
        f"saved again from memory in {dtype}: {now['bytes']:,} bytes of weights; what was measured "
        "was measured before"
    )
    notes = report.get("notes")
    report["notes"] = [*(notes if isinstance(notes, list) else []), note]
    (folder / REPORT_FILE).write_text(as_json(report), encoding="utf-8")
    if card is not None:
        told = card.read_text(encoding="utf-8").rstrip()
        card.write_text(f"{told}\n\n## Since then\n\n- {note}\n", encoding="utf-8")

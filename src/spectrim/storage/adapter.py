"""A LoRA adapter as PEFT, vLLM and others read it: `adapter_config.json` and one weight file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from spectrim.storage.atomic import new_folder
from spectrim.storage.json_file import as_json
from spectrim.storage.origin import HUB_ID
from spectrim.storage.paths import last_part
from spectrim.storage.tensor_file import Slot, write_tensors

RECORD_FILE = "spectrim_adapter.json"
WEIGHT_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    output: str | Path,
    *,
    rank: int,
    transposed: bool,
    base: str,
    dtype: torch.dtype,
    record: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write `W + up · down` for every target, with a scaling of one (`lora_alpha = r`).

    Args:
        factors: module path -> up (out, r) and down (r, in).
        output: a new or empty folder, or one of ours with `overwrite`.
        rank: r.
        transposed: whether the base's layers store (in, out).
        base: name or folder of the model that the adapter is for.
        dtype: of the stored factors.
        record: how the adapter was made, JSON-ready.
        overwrite: replace the folder that is there.

    Raises:
        OutputError: the destination is taken or cannot be written.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(factors),
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
    slots = [
        Slot.of(f"{PREFIX}{name}.{key}.weight", tensor.to(dtype))
        for name, (up, down) in factors.items()
        for key, tensor in (("lora_A", down), ("lora_B", up))
    ]
    with new_folder(output, overwrite=overwrite) as folder:
        write_tensors(folder / WEIGHT_FILE, slots, {"format": "pt"})
        for name, content in (("adapter_config.json", config), (RECORD_FILE, record)):
            (folder / name).write_text(as_json(content), encoding="utf-8")
        (folder / "README.md").write_text(_card(base, rank, record), encoding="utf-8")
    return Path(output)


def _card(base: str, rank: int, record: Mapping[str, Any]) -> str:
    """What it is and how it is loaded; no path of this machine is in it."""
    matter = {"library_name": "peft", "tags": ["spectrim", "lora", "low-rank"]}
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        matter["base_model"] = base
    share = record["left"] / record["difference"] if record["difference"] > 0 else 0.0
    return (
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n\n"
        f"# Adapter of rank {rank} for `{last_part(base)}`\n\n"
        f"The best difference of rank {rank} between `{last_part(record['model'])}` and "
        f"`{last_part(base)}`, made by spectrim with the objective `{record['objective']}`: "
        f"{1 - share:.1%} of the difference ({record['unit']}) is in it.\n\n"
        "```python\n"
        "import spectrim  # where the base is a model compressed by spectrim\n"
        "from peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base, "this-folder")\n'
        "```\n"
    )

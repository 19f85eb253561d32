"""Export: coded matrices as `compressed-tensors`, which inference servers multiply as they are.

A target of integers becomes `weight_packed` (codes of b bits, offset by 2^(b-1), as many as fit
into an int32, the first in its lowest bits), `weight_scale` and `weight_shape`, one of float8
`weight`, its codes, and `weight_scale`; everything else keeps its name. Only targets that were not
cut can be held: the format has no layer of two factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import InputError
from spectrim.formats.float8 import Float8
from spectrim.formats.grouped import Grouped
from spectrim.formats.int8 import Int8
from spectrim.formats.number_format import Coded
from spectrim.storage.atomic import check_output, new_folder
from spectrim.storage.dense import write_beside
from spectrim.storage.inspect import FolderInspection, StoredTarget
from spectrim.storage.tensor_file import Slot, write_tensors
from spectrim.storage.whole_matrices import WholeMatrices, coded

_PACKED = "pack-quantized"


def packed_int32(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, columns) -> int32 (rows, columns / (32 // bits)), padded with zeros."""
    per_word = 32 // bits
    rows, columns = codes.shape
    shifted = torch.nn.functional.pad(codes.long() + 2 ** (bits - 1), (0, -columns % per_word))
    parts = shifted.view(rows, -1, per_word) << (bits * torch.arange(per_word))
    words = parts.sum(dim=2)  # disjoint bits, at most 32 of them
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def export_compressed_tensors(
    folder: str | Path, output: str | Path, *, overwrite: bool = False
) -> Path:
    """Write a result of dense coded targets as a `compressed-tensors` checkpoint.

    Args:
        folder: a result of spectrim.
        output: a new or empty folder, or any model folder with `overwrite`.
        overwrite: replace the model folder that is there.

    Raises:
        InputError: a target is stored in a way that the format cannot hold; names it, and what
            would do.
        ArtifactError: `folder` is damaged or holds no compressed model.
        OutputError: the destination is taken or cannot be written.
    """
    source = Path(folder)
    check_output(output, overwrite=overwrite, sources=[("the result", source)])
    matrices = WholeMatrices.of(source, "compressed-tensors")
    for target in matrices.rounded:
        _check(target)
    with new_folder(output, overwrite=overwrite) as destination:
        write_tensors(destination / "model.safetensors", list(_slots(matrices)))
        write_beside(source, destination, _scheme(matrices.found, matrices.rounded))
    return Path(output)


def _check(target: StoredTarget) -> None:
    """Refuse what the format cannot hold."""
    row = coded(target)
    if isinstance(row, Grouped) and target.in_features % row.group:
        raise InputError(
            f"{target.name} has {target.in_features} inputs, which are no whole groups of "
            f"{row.group}; compressed-tensors has no group that is not full. int8, with a scale "
            "per row, always fits"
        )
    if not isinstance(row, Grouped | Int8 | Float8):
        raise InputError(
            f"{target.name} has {target.weights} numbers with zero points of their own kind; "
            f"int4-g32 is the nearest format that compressed-tensors holds"
        )


def _slots(matrices: WholeMatrices) -> Iterator[Slot]:
    """Every tensor of the export."""
    done: set[str] = set()
    for target in matrices.rounded:
        done |= set(matrices.tensors_of(target).values())
        shape = torch.tensor([target.out_features, target.in_features])
        codes, scales = matrices.codes(target)
        row = coded(target)
        values = scales["scale"].to(_dtype(matrices.found)).contiguous()
        yield Slot.of(f"{target.name}.weight_scale", values)
        if row.integer:
            yield Slot.of(f"{target.name}.weight_packed", packed_int32(codes, row.bits))
            yield Slot.of(f"{target.name}.weight_shape", shape)
        else:
            yield Slot.of(f"{target.name}.weight", row.pack(codes))
    for name in matrices.found.tensors:
        if name not in done:
            yield Slot.of(name, matrices.read(name))


def _dtype(found: FolderInspection) -> torch.dtype:
    """Of the checkpoint's own numbers."""
    words = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return words[found.targets[0].dtype]


def _scheme(found: FolderInspection, rounded: list[StoredTarget]) -> dict[str, Any]:
    """The `quantization_config`: one group per format, its targets by name."""
    groups: dict[str, Any] = {}
    kinds = sorted({_kind(coded(target)) for target in rounded}) or [_PACKED]
    formats = {target.weights: coded(target) for target in rounded}
    for weights, row in sorted(formats.items()):
        group = getattr(row, "group", None)
        groups[f"group_{len(groups)}"] = {
            "targets": [target.name for target in rounded if target.weights == weights],
            "weights": {
                "num_bits": row.bits,
                "type": "int" if row.integer else "float",
                "symmetric": True,
                "dynamic": False,
                "strategy": "channel" if group is None else "group",
                "group_size": group,
            },
            "input_activations": None,
            "output_activations": None,
        }
        if len(kinds) > 1:
            groups[f"group_{len(groups) - 1}"]["format"] = _kind(row)
    kept = [target.name for target in found.targets if target.weights == "native"]
    return {
        "quant_method": "compressed-tensors",
        "format": kinds[0] if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *kept],
    }


def _kind(row: Coded) -> str:
    """The package's word for how the codes of a format lie."""
    return _PACKED if row.integer else "float-quantized"

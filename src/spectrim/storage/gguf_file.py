"""Export: one GGUF file, which llama.cpp and the programs around it run.

Targets that were rounded keep their codes and scales (`gguf_blocks.py`), everything else its own
numbers; vectors are fp32, as those engines want them. Where the rotation of queries and keys pairs
channels that lie side by side, their rows are put into that order.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import InputError, MissingExtraError
from spectrim.storage.atomic import check_output, new_folder
from spectrim.storage.gguf_blocks import BLOCK, block_type, blocks
from spectrim.storage.gguf_metadata import (
    ARCHITECTURES,
    add_network,
    add_tokenizer,
    rope_factors,
)
from spectrim.storage.inspect import StoredTarget
from spectrim.storage.origin import LICENSES
from spectrim.storage.whole_matrices import WholeMatrices, coded

FILE = "model.gguf"
"""The file in the folder that is written."""


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: what its header says, and where its bytes come from."""

    name: str
    type: str
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]


def export_gguf(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a result of dense targets as `model.gguf`, integers as they are.

    Args:
        folder: a result of spectrim.
        output: a new or empty folder, or any folder of ours with `overwrite`.
        overwrite: replace the folder that is there.

    Raises:
        MissingExtraError: `gguf` is not installed.
        InputError: an architecture, a tokenizer or a target that the format cannot hold; names it,
            and what would do.
        ArtifactError: `folder` is damaged or holds no compressed model.
        OutputError: the destination is taken or cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "the export to GGUF") from error
    from transformers import AutoConfig

    source = Path(folder)
    check_output(output, overwrite=overwrite, sources=[("the result", source)])
    matrices = WholeMatrices.of(source, "GGUF")
    config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(
            f"{source} is a {config.model_type}; what is written to GGUF are "
            f"{', '.join(ARCHITECTURES)}. Export it --dense and use the engine's own script"
        )
    for target in matrices.rounded:
        _check(target)
    with new_folder(output, overwrite=overwrite) as destination:
        writer: Any = gguf.GGUFWriter(destination / FILE, architecture)
        add_network(writer, config, name=config.name_or_path or source.name)
        add_tokenizer(writer, source, config.vocab_size)
        entries = list(_entries(matrices, config, architecture, rope_factors(config, source)))
        for entry in entries:
            numbers = gguf.GGMLQuantizationType[entry.type]
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[numbers]
            row = entry.shape[-1] // per_block * block_bytes
            size = torch.Size(entry.shape[:-1]).numel() * row
            shape = (*entry.shape[:-1], row)
            writer.add_tensor_info(entry.name, shape, _bytes_dtype(), size, numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.fetch().contiguous().view(torch.uint8).numpy())
        writer.close()
        for path in sorted(source.iterdir()):
            if path.is_file() and LICENSES.fullmatch(path.name):
                shutil.copyfile(path, destination / path.name)
    return Path(output)


def _check(target: StoredTarget) -> None:
    """Refuse what no type of GGUF holds."""
    if not coded(target).integer:
        raise InputError(
            f"{target.name} has {target.weights} numbers, of which GGUF has no type; int8-g32 is "
            "the nearest format that it holds"
        )
    if target.in_features % BLOCK:
        raise InputError(
            f"{target.name} has {target.in_features} inputs, which are no whole blocks of "
            f"{BLOCK}; protect it with --skip '{target.name}', and it is written as it is"
        )


def _bytes_dtype() -> Any:
    import numpy as np

    return np.dtype("uint8")


def _entries(
    matrices: WholeMatrices, config: Any, architecture: str, factors: Tensor | None
) -> Iterator[_Entry]:
    """Every tensor of the file in its order."""
    import gguf

    known = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture],
        config.num_hidden_layers,
    )

    def name_of(tensor: str) -> str:
        found = known.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{tensor} has no place in a GGUF file of {architecture} models")
        return found

    if factors is not None:
        yield _Entry("rope_freqs.weight", "F32", tuple(factors.shape), lambda: factors)
    done: set[str] = set()
    for target in matrices.rounded:
        done |= set(matrices.tensors_of(target).values())
        weight, shape = f"{target.name}.weight", (target.out_features, target.in_features)
        rows = _rows(weight, shape[0], config, architecture)
        kind = block_type(coded(target).bits, "zero" in matrices.tensors_of(target))
        yield _Entry(name_of(weight), kind, shape, partial(_rounded, matrices, target, rows))
    for tensor, stored in matrices.found.tensors.items():
        if tensor not in done:
            shape = tuple(stored.shape)
            kind = "F32" if len(shape) == 1 else stored.dtype
            rows = _rows(tensor, shape[0], config, architecture)
            yield _Entry(name_of(tensor), kind, shape, partial(_plain, matrices, tensor, rows))


def _rounded(matrices: WholeMatrices, target: StoredTarget, rows: Tensor | None) -> Tensor:
    codes, scales = matrices.codes(target)
    found = blocks(codes, scales, coded(target).bits, name=target.name)
    return found if rows is None else found[rows]


def _plain(matrices: WholeMatrices, tensor: str, rows: Tensor | None) -> Tensor:
    found = matrices.read(tensor)
    found = found if rows is None else found[rows]
    return found.float() if found.ndim == 1 else found


def _rows(tensor: str, count: int, config: Any, architecture: str) -> Tensor | None:
    """The order of a tensor's rows in the file, None where it stays.

    A head's first and second half are rotated together; `llama` engines expect the pairs of
    channels side by side.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = tensor.split(".")[-2] if tensor.count(".") > 1 else ""
    if architecture != "llama" or projection not in heads:
        return None
    return torch.arange(count).view(heads[projection], 2, -1).mT.reshape(-1)

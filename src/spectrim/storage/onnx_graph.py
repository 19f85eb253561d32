"""Export: a graph for ONNX Runtime and OpenVINO, factors as two products each.

One graph serves prompts and single tokens: it takes tokens and the keys and values so far, and
gives logits and the keys and values after them. Numbers are fp32, which both engines compute in on
a CPU; an engine's own weight compression (int8, int4) applies to factors as to any matrix.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import InputError, MissingExtraError, ModelError
from spectrim.model.forward import evaluating
from spectrim.storage.atomic import check_output, new_folder
from spectrim.storage.dense import load_folder, write_beside
from spectrim.storage.inspect import inspect_folder

EXAMPLE = (2, 3, 5)
"""Windows, tokens and earlier tokens that the graph is traced with; all three may be any."""


class _Decoder(nn.Module):
    """A model whose cache is an argument."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        out = self.model(input_ids=input_ids, past_key_values=DynamicCache(past), use_cache=True)
        return out.logits, [(one.keys, one.values) for one in out.past_key_values.layers]


def export_onnx(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write `model.onnx` and the tokenizer of a result, or of a dense model to compare with.

    Inputs are `input_ids` (B, S) and `past_key_values.I.key` and `.value` (B, heads, P, width) of
    every layer I, with P = 0 at the beginning; outputs are `logits` (B, S, vocabulary) and
    `present.I.key` and `.value` (B, heads, P + S, width). All windows of a batch are equally long.

    Args:
        folder: a result of spectrim in native numbers, or an ordinary model.
        output: a new or empty folder, or any folder of ours with `overwrite`.
        overwrite: replace the folder that is there.

    Raises:
        MissingExtraError: `onnxscript` is not installed.
        InputError: coded weights, which the engines' own compression makes.
        ModelError: the architecture cannot be written as one graph; gives torch's reason.
        ArtifactError: `folder` is damaged.
        OutputError: the destination is taken or cannot be written.
    """
    source = Path(folder)
    check_output(output, overwrite=overwrite, sources=[("the result", source)])
    _require()
    table = inspect_folder(source).table
    layers = {} if table is None else table.layers
    rounded = [name for name, entry in layers.items() if entry.weights != "native"]
    if rounded:
        raise InputError(
            f"{len(rounded)} layers of {source} have coded weights ({rounded[0]}, ...), which "
            "ONNX engines make themselves of a graph in native numbers; export a result with "
            "--weights native and let the engine round it"
        )
    model = load_folder(source, dtype=torch.float32)
    program = _graph(source, model)
    with new_folder(output, overwrite=overwrite) as destination:
        program.save(str(destination / "model.onnx"))
        write_beside(source, destination, None)
    return Path(output)


def _require() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnxscript", "onnx", "the export to ONNX") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of packages that no decoder needs, and of itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


@torch.no_grad()
def _graph(source: Path, model: Any) -> Any:
    """The program that torch exports.

    Raises:
        ModelError: it cannot.
    """
    windows, tokens, before = EXAMPLE
    ids = torch.zeros(windows, tokens, dtype=torch.int64)
    with evaluating(model), _quiet():
        caches = model(input_ids=ids, use_cache=True).past_key_values
        layers = getattr(caches, "layers", None)
        if not layers or not all(isinstance(getattr(one, "keys", None), Tensor) for one in layers):
            raise ModelError(
                f"{source}: the cache of {type(model).__name__} is no list of keys and values, and "
                "the graph has no other state; export it --dense for other engines"
            )
        past = [
            tuple(torch.zeros(*t.shape[:2], before, t.shape[3]) for t in (one.keys, one.values))
            for one in layers
        ]
        free = torch.export.Dim.DYNAMIC
        shapes: Any = ({0: free, 1: free}, [({0: free, 2: free},) * 2] * len(past))
        pairs = [(i, part) for i in range(len(past)) for part in ("key", "value")]
        try:
            exported = torch.export.export(
                _Decoder(model), (ids, past), dynamic_shapes=shapes, strict=False
            )
            return torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                input_names=["input_ids", *(f"past_key_values.{i}.{part}" for i, part in pairs)],
                output_names=["logits", *(f"present.{i}.{part}" for i, part in pairs)],
            )
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{source}: {type(model).__name__} cannot be written as one graph ({reason}); "
                "export it --dense for engines that load it themselves"
            ) from error

"""How fast a model reads and writes at several batches and lengths, and how fast it could be.

Decoding one token reads every stored weight once, reading a prompt multiplies with every one:
where memory traffic and arithmetic are all that counts, the first speeds up by the bytes that a
compressed model saves and the second by the multiplications. `Work` counts both, and a benchmark
prints that ideal beside what was reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.allocate.budget import Shape, layer_bytes
from spectrim.devices import forget_peak_memory, on_host, peak_memory
from spectrim.errors import InputError
from spectrim.formats import FORMATS
from spectrim.layers.quantized import QuantizedLinear
from spectrim.layers.swap import compressed_layers
from spectrim.model.weights import is_linear
from spectrim.serve.prepack import PrepackedLinear
from spectrim.serve.prepack_codes import PrepackedCodes
from spectrim.serve.speed import Speed, speed

# Their matrices are no parameters and no buffers.
_PREPACKED = (PrepackedLinear, PrepackedCodes)


@dataclass(frozen=True)
class Work:
    """What one token costs a model, attention and norms aside.

    Attributes:
        bytes: weights that are read: everything stored but an embedding that is only looked up.
        products: multiplications with weights.
    """

    bytes: int
    products: int

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Cell:
    """One batch at one prompt length.

    Attributes:
        speed: the measurement.
        peak_memory_bytes: of the device, or of the whole process on a CPU; None where the
            platform does not tell.
    """

    speed: Speed
    peak_memory_bytes: int | None

    @property
    def first_token(self) -> float:
        """Seconds from the prompt to the first new token."""
        return self.speed.batch * self.speed.prompt_length / self.speed.prefill

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "batch": self.speed.batch,
            "prompt_length": self.speed.prompt_length,
            "prefill_tokens_per_second": self.speed.prefill,
            "decode_tokens_per_second": self.speed.decode,
            "first_token_seconds": self.first_token,
            "peak_memory_bytes": self.peak_memory_bytes,
            "cache_bytes_per_token": self.speed.cache_bytes,
        }


def work_of(model: Any) -> Work:
    """Count what a token costs, in the dtypes in which the model lies in memory."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    looked_up = head is None or getattr(head, "weight", None) is not embedding
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    if looked_up:
        tensors.pop(id(embedding), None)
    packed = (m.weight_bytes for m in model.modules() if isinstance(m, _PREPACKED))
    return Work(
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()) + sum(packed),
        products=sum(_products(module) for module in model.modules()),
    )


def uncut_bytes(model: Any, work: Work) -> dict[str, int]:
    """Bytes that a token would read if no compressed layer were cut, only rounded: int8, int4.

    What low rank has to be held against: rounding alone saves more than most cuts.
    """
    found: dict[str, int] = {}
    for weights in (name for name, row in FORMATS.items() if row.reference):
        change = 0
        for layer in compressed_layers(model).values():
            shape = Shape(layer.out_features, layer.in_features, layer.bias is not None)
            size: int = model.dtype.itemsize
            change -= layer_bytes(
                shape,
                rank=layer.rank,
                storage=layer.storage,
                weights=layer.weights,
                dtype_bytes=size,
            )
            change += layer_bytes(
                shape, rank=None, storage="dense", weights=weights, dtype_bytes=size
            )
        found[weights] = work.bytes + change
    return found


def paths_of(model: nn.Module) -> dict[str, int]:
    """How the products with coded weights run -> how many matrices; empty without any."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, PrepackedCodes):
            found[module.kernel.name] += 1
        elif isinstance(module, QuantizedLinear):
            found[module.format.path(module.stored, module.dtype)] += 1
    return dict(found)


def measure_cells(
    model: Any,
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> Iterator[Cell]:
    """Measure every batch at every prompt length, one after the other.

    Args:
        model: a Hugging Face causal language model.
        batches: sequences side by side.
        lengths: tokens per prompt.
        new_tokens: tokens to write per sequence.
        repeats: counted runs behind each median.

    Raises:
        InputError: no sizes, sizes below 1, or more tokens than the model has positions.
    """
    if not batches or not lengths:
        raise InputError(f"nothing to measure: batches {list(batches)}, lengths {list(lengths)}")
    device = model.get_input_embeddings().weight.device
    for batch in batches:
        for length in lengths:
            with _peak_memory(device) as peak:
                measured = speed(
                    model,
                    prompt_length=length,
                    new_tokens=new_tokens,
                    batch=batch,
                    repeats=repeats,
                )
            yield Cell(measured, peak.bytes)


def _products(module: nn.Module) -> int:
    if isinstance(module, (QuantizedLinear, *_PREPACKED)):
        return module.in_features * module.out_features
    return module.weight.numel() if is_linear(module) else 0  # type: ignore[union-attr]


class _Peak:
    """The result of `_peak_memory`, known when its body is done."""

    bytes: int | None = None


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[_Peak]:
    """Largest memory in use during the body."""
    peak = _Peak()
    forget_peak_memory(device)
    known = on_host(device) and _forget_peak()
    yield peak
    peak.bytes = _resident_peak() if known else peak_memory(device)


def _forget_peak() -> bool:
    """Let Linux count this process's peak memory from now on; False where that is impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    for line in (
        Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    ):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None

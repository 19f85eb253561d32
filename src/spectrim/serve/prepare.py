"""One call after loading that makes a model run fast where it lies.

What is stored best does not always run best. Six changes are known, each exact up to the rounding
of a product, and each is made where it pays:

- *restored*: coded weights that no kernel reads here are restored once, not for every product;
- *unpacked*: away from CPUs, where a gather and a cat are two launches more, a packed layer becomes
  two factors with the very numbers that it stores, for k² numbers more;
- *ordered*: weights and codes go into the order of a device's kernels, if it has any (`prepack`);
- *grouped*: elsewhere, experts of equal ranks become one product for all of them (`grouped`);
- *joined*: elsewhere, first factors that read the same input become one product (`fuse`), since
  what few tokens cost there is launches. On a CPU that gains nothing, and an ordered weight cannot
  be joined;
- *quick*: elsewhere, products of a few tokens by a kernel of our own (`few_tokens`), one launch for
  all layers that read the same input, for the shapes for which this device was just seen to be
  faster with it; integers are read as they are stored, and restored in one launch for many tokens.

The first two take memory, and are made as far as it reaches: restored first, because a matrix that
is restored for every token costs most, and layer by layer from the one that needs least, so that as
many as possible are served. docs/storage.md has the measurements behind the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectrim.allocate.budget import format_bytes
from spectrim.devices import device_seconds, on_host
from spectrim.errors import BudgetError, ModelError
from spectrim.layers.layout import layout_of
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import QuantizedLinear, part_of, wide_weight
from spectrim.layers.swap import compressed_layers, restore_dense, swap_in
from spectrim.serve.few_tokens import (
    QuickCodes,
    Together,
    companies,
    fits,
    obstacle,
    quick_codes,
)
from spectrim.serve.fusion import FusedSlice, fuse, shared_inputs
from spectrim.serve.grouped import group_experts
from spectrim.serve.prepack import PrepackedLinear, prepack
from spectrim.serve.prepack_codes import PrepackedCodes, can_prepack_codes
from spectrim.serve.product import product_of
from spectrim.sizes import parse_size

_ORDERED = (PrepackedLinear, PrepackedCodes)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` chose.

    Attributes:
        layers: module path of a compressed layer -> how it multiplies now.
        ordered: matrices of the whole model, dense ones included, in the order of their kernels.
        bytes_before: of all weights, as they were loaded.
        bytes_after: of all weights.
        notes: what this device could not be given.
    """

    layers: dict[str, str]
    ordered: int
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """JSON-ready: how many layers multiply in which way, and the bytes of all weights."""
        ways = sorted(set(self.layers.values()))
        return {
            "layers": {way: sum(found == way for found in self.layers.values()) for way in ways},
            "ordered": self.ordered,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "notes": list(self.notes),
        }


@torch.no_grad()
def prepare(
    model: nn.Module,
    *,
    memory: int | str | None = None,
    groups: Iterable[Sequence[str]] | None = None,
) -> Prepared:
    """Arrange a model's weights so that it runs fast on the device where it lies, in place.

    For running, not for training. A model that is moved or cast afterwards is prepared for the
    place it left: load it there and prepare it then. What is saved afterwards is the same matrix;
    unpacked and restored layers are saved as such, and larger.

    Args:
        model: a causal language model, compressed or dense.
        memory: bytes that all weights may take, or "2GB", or "any"; None for what they take now.
        groups: module paths of layers that share an input; None finds them by tracing two tokens.

    Returns:
        What was chosen, layer by layer, and what it takes.

    Raises:
        BudgetError: the weights take more than `memory` as they are, or it is no size.
        ModelError: the model was prepared before.
    """
    done = (*_ORDERED, FusedSlice, QuickCodes)
    if any(isinstance(m, done) or getattr(m, "together", None) for m in model.modules()):
        raise ModelError("the model is prepared already; load it again to prepare it otherwise")
    before = memory_of(model)
    room = _room(memory, before)
    first = next(model.parameters(), None)
    host = first is None or on_host(first.device)
    lacks = "" if host else obstacle(first.device)  # type: ignore[union-attr]
    kernel = not (host or lacks)
    changed: dict[str, str] = {}
    changes = _changes(model, kernel)
    for needs, name, change in sorted(changes, key=lambda c: (c[2] != _RESTORED, c[0])):
        if needs <= room:
            room -= needs
            changed[name] = change
            _CHANGES[change](model, name)
    ways: dict[str, set[str]] = {}
    notes: list[str] = []
    ordered = 0 if kernel else prepack(model)
    if not host and compressed_layers(model):
        ways["grouped"], single = group_experts(model)
        notes += [f"{name}: experts one by one, {why}" for name, why in single.items()]
        found = shared_inputs(model) if groups is None else [tuple(names) for names in groups]
        ways["joined"] = {name for group in fuse(model, found).groups for name in group}
        if kernel:
            quick_codes(model)
            ways["quick"] = _quicken(model, found)
        else:
            notes.append(f"{lacks}: few tokens by ordinary products")
    layers = {name: "dense" for name, change in changed.items() if change == _RESTORED}
    for name, layer in compressed_layers(model).items():
        words = [layer.storage, layer.weights, changed.get(name, "")]
        words += [way for way, names in ways.items() if name in names]
        words += ["ordered"] if any(isinstance(m, _ORDERED) for m in layer.modules()) else []
        layers[name] = ", ".join(word for word in words if word)
    return Prepared(layers, ordered, before, memory_of(model), tuple(notes))


def memory_of(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, each counted once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    packed = (m.weight_bytes for m in model.modules() if isinstance(m, _ORDERED))
    return sum(t.numel() * t.element_size() for t in tensors.values()) + sum(packed)


def _room(memory: int | str | None, before: int) -> float:
    if memory is None:
        return 0
    if memory == "any":
        return float("inf")
    limit = parse_size(memory) if isinstance(memory, str) else memory
    if limit < before:
        raise BudgetError(
            f"the weights take {format_bytes(before)}, memory is {format_bytes(limit)}; give more, "
            "or load a smaller model"
        )
    return limit - before


_RESTORED, _UNPACKED = "restored", "unpacked"


def _changes(model: nn.Module, kernel: bool) -> list[tuple[int, str, str]]:
    """(bytes it needs, layer, change) of every layer that would run faster in another form.

    Args:
        model: with compressed layers.
        kernel: whether ours reads codes and orders as they are stored.
    """
    found = []
    for name, layer in compressed_layers(model).items():
        codes = [m for m in layer.modules() if isinstance(m, QuantizedLinear)]
        if any(not _read(m, kernel) for m in codes):
            found.append((_native_bytes(layer) - memory_of(layer), name, _RESTORED))
        elif isinstance(layer, PackedLinear) and not codes and not on_host(layer.weight.device):
            saved = layer.order.numel() * layer.order.element_size()
            found.append((layer.rank**2 * layer.weight.element_size() - saved, name, _UNPACKED))
    return found


def _read(codes: QuantizedLinear, kernel: bool) -> bool:
    """Whether products of a few tokens work on the codes where they lie."""
    product = product_of(codes) if kernel else None
    if product is not None:
        return product.fits(codes.dtype)
    return codes.reads_codes or can_prepack_codes(codes)


def _native_bytes(layer: Any) -> int:
    """What a layer takes with the numbers of the model around it."""
    part = next(m for m in layer.modules() if isinstance(m, QuantizedLinear))
    size = part.dtype.itemsize
    # A matrix that was not cut comes back as it was, its correction added.
    layout = layout_of("dense" if layout_of(layer.storage).whole else layer.storage)
    biases = layer.out_features * size if layer.bias is not None else 0
    return layout.bytes(layer.out_features, layer.in_features, layer.rank or 0, size) + biases


def _restore(model: nn.Module, name: str) -> None:
    """Integer parts become ordinary ones; a layer that was not cut becomes what it was."""
    layer: Any = model.get_submodule(name)
    if layout_of(layer.storage).whole:
        restore_dense(model, name, dtype=layer.weight.dtype)
        return
    for part in layout_of(layer.storage).formats:
        old = layer.get_submodule(part)
        new = part_of(wide_weight(old), old.bias, "native", dtype=old.weight.dtype)
        setattr(layer, part, new.train(layer.training))
    layer.weights = "native"


def _unpack(model: nn.Module, name: str) -> None:
    """The identity that packing leaves out is put back: the same product, number for number."""
    layer: Any = model.get_submodule(name)
    parts = layer.packed()
    up, down = parts.factors()
    new = LowRankLinear.from_factors(
        up, down, layer.bias, dtype=layer.weight.dtype, device=layer.weight.device
    )
    swap_in(model, name, new)


_CHANGES = {_RESTORED: _restore, _UNPACKED: _unpack}


def _dtype(layer: Any) -> torch.dtype:
    """Of the tokens that a compressed layer multiplies."""
    part = layer.get_submodule(next(iter(layout_of(layer.storage).formats)))
    return part.dtype if isinstance(part, QuantizedLinear) else part.weight.dtype


def _quicken(model: nn.Module, groups: Iterable[Sequence[str]]) -> set[str]:
    """Layers that use our kernel from now on: one company of every shape is timed both ways."""
    layers = compressed_layers(model)
    able = {name: layer for name, layer in layers.items() if fits(layer, _dtype(layer))}
    faster: dict[Any, bool] = {}
    chosen: set[str] = set()
    for names in companies(able, groups):
        members = [able[name] for name in names]
        first: Any = members[0]
        key = tuple(
            (type(m), m.in_features, m.out_features, m.rank, m.weights, _dtype(m)) for m in members
        )
        company = None
        if key not in faster:
            place = next(first.buffers(), next(first.parameters(), None)).device  # type: ignore[union-attr]
            x = torch.ones(1, first.in_features, dtype=_dtype(first), device=place)

            def run(members=members, x=x) -> None:
                for member in members:
                    member(x)

            plain = device_seconds(run, x.device)
            company = Together(members)
            faster[key] = device_seconds(run, x.device) < plain
        if faster[key]:
            company = company or Together(members)
            chosen.update(names)
        elif company is not None:
            company.undo()
    return chosen

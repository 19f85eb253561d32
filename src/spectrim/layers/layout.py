"""What each storage kind looks like: its tensors, their shapes, and their names on disk.

A compressed linear layer keeps a few tensors under its module path. One of them, the *weight key*,
is written to disk under the original name `<linear>.weight`; its shape always differs from the
dense shape, so that a loader that does not know spectrim stops at a shape mismatch instead of
inventing random weights for a missing key. The bias keeps its original name as well.

This file is data only and imports no torch: `spectrim inspect` reads headers with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from spectrim.errors import ArtifactError

__all__ = ["LAYERS", "Layout", "Shape", "layout_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One storage kind.

    Attributes:
        kind: the word used in plans and in `config.json`.
        location: `module:class` of the layer, imported only when a layer is built.
        weight_key: path below the layer of the tensor that is stored as `<linear>.weight`.
        bias_key: path below the layer of the bias, stored as `<linear>.bias`.
        shapes: (out_features, in_features, rank) -> path below the layer -> shape, without bias.
        sides: (shape of the stored weight, shapes of the other tensors) -> (out, in, rank).
        integers: paths below the layer whose tensors hold integers, each a permutation.
    """

    kind: str
    location: str
    weight_key: str
    bias_key: str
    shapes: Callable[[int, int, int], dict[str, Shape]]
    sides: Callable[[Mapping[str, Shape]], tuple[int, int, int]]
    integers: frozenset[str] = frozenset()

    def layer_class(self) -> Any:
        """The `nn.Module` class of this kind."""
        module, _, name = self.location.partition(":")
        return getattr(import_module(module), name)

    def tensors(
        self, out_features: int, in_features: int, rank: int, bias: bool
    ) -> dict[str, Shape]:
        """Path below the layer in memory -> shape, for every tensor of a layer."""
        shapes = self.shapes(out_features, in_features, rank)
        if bias:
            shapes[self.bias_key] = (out_features,)
        return shapes

    def disk_key(self, key: str) -> str:
        """The name on disk, below the layer, of an in-memory path below the layer."""
        return self.renames().get(key, key)

    def renames(self) -> dict[str, str]:
        """In-memory path -> name on disk, for the paths whose two names differ."""
        pairs = {self.weight_key: "weight", self.bias_key: "bias"}
        return {memory: disk for memory, disk in pairs.items() if memory != disk}

    def dimensions(self, disk_shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
        """(out, in, rank) from the shapes on disk, keyed by the name below the layer.

        Raises:
            KeyError: a tensor of this layout is absent.
            ValueError: a shape has the wrong number of axes.
        """
        memory = {disk: key for key, disk in self.renames().items()}
        return self.sides({memory.get(key, key): shape for key, shape in disk_shapes.items()})


def _factored_shapes(out_features: int, in_features: int, rank: int) -> dict[str, Shape]:
    return {"up.weight": (out_features, rank), "down.weight": (rank, in_features)}


def _factored_sides(shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    out_features, _ = shapes["up.weight"]
    rank, in_features = shapes["down.weight"]
    return out_features, in_features, rank


def _packed_shapes(out_features: int, in_features: int, rank: int) -> dict[str, Shape]:
    # The pivots lie on the smaller side (`linalg.pivot.packed_side`), so the shapes tell the side.
    m, n, k = out_features, in_features, rank
    if m <= n:
        return {"basis.weight": (k, n), "coefficients.weight": (m - k, k), "order": (m,)}
    return {"basis.weight": (m, k), "coefficients.weight": (k, n - k), "order": (n,)}


def _packed_sides(shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    first, second = shapes["basis.weight"]
    rows, columns = shapes["coefficients.weight"]
    (pivoted,) = shapes["order"]
    if columns == first and pivoted <= second:
        return pivoted, second, first
    if rows == second:
        return first, pivoted, second
    raise ValueError(f"packed tensors of shapes {dict(shapes)} do not fit together")


LAYERS: Mapping[str, Layout] = MappingProxyType(
    {
        "factored": Layout(
            "factored",
            "spectrim.layers.lowrank:LowRankLinear",
            weight_key="up.weight",
            bias_key="up.bias",
            shapes=_factored_shapes,
            sides=_factored_sides,
        ),
        "packed": Layout(
            "packed",
            "spectrim.layers.packed:PackedLinear",
            weight_key="basis.weight",
            bias_key="bias",
            shapes=_packed_shapes,
            sides=_packed_sides,
            integers=frozenset({"order"}),
        ),
    }
)
"""Storage kind -> layout. A new kind is one row here and one layer class."""


def layout_of(kind: str) -> Layout:
    """The layout of a storage kind; an unknown kind is an `ArtifactError` naming the known ones."""
    if kind not in LAYERS:
        raise ArtifactError(
            f"unknown storage {kind!r}; this version of spectrim knows {', '.join(sorted(LAYERS))}"
        )
    return LAYERS[kind]

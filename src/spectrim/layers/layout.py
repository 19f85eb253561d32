"""What each storage kind looks like: its tensors, their shapes, and their names on disk.

A compressed linear layer keeps a few tensors under its module path. One of them, the *weight key*,
is written to disk under the original name `<linear>.weight`; its shape always differs from the
dense shape, so that a loader that does not know spectrim stops at a shape mismatch instead of
inventing random weights for a missing key. The bias keeps its original name as well.

Integer number formats apply to every matrix of a kind in the same way: `<part>.weight` becomes
`<part>.codes` and `<part>.scale` (and `<part>.zero` for int4), and the scales take the original
name on disk, since codes can have the dense shape. A target that was not cut has such a layout
too, the kind `dense`.

This file is data only and imports no torch: `spectrim inspect` reads headers with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from spectrim.errors import ArtifactError

__all__ = ["INT4_GROUP", "LAYERS", "Layout", "Shape", "layout_of", "matrix_tensors"]

Shape = tuple[int, ...]

INT4_GROUP = 32
"""Numbers of a row that share one scale and zero point in int4 storage."""


@dataclass(frozen=True)
class Layout:
    """One storage kind.

    Attributes:
        kind: the word used in plans and in `config.json`.
        weights: number format of its matrices.
        location: `module:class` of the layer, imported only when a layer is built.
        weight_key: path below the layer of the tensor that is stored as `<linear>.weight`.
        bias_key: path below the layer of the bias, stored as `<linear>.bias`.
        shapes: (out_features, in_features, rank) -> path below the layer -> shape, without bias.
        sides: shapes by path below the layer -> (out, in, rank); a layout with integer numbers
            has none, its configuration names the shape.
        integers: paths below the layer whose tensors hold integers, each a permutation.
    """

    kind: str
    location: str
    weight_key: str
    bias_key: str
    shapes: Callable[[int, int, int], dict[str, Shape]]
    sides: Callable[[Mapping[str, Shape]], tuple[int, int, int]] | None
    integers: frozenset[str] = frozenset()
    weights: str = "native"

    def layer_class(self) -> Any:
        """The `nn.Module` class of this kind."""
        module, _, name = self.location.partition(":")
        return getattr(import_module(module), name)

    def matrices(self, out_features: int, in_features: int, rank: int | None) -> dict[str, Shape]:
        """Path below the layer -> shape, of the matrices of a layout with native numbers."""
        shapes = self.shapes(out_features, in_features, rank or 0)
        return {key: shape for key, shape in shapes.items() if key.endswith(".weight")}

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
        if self.sides is None:
            raise KeyError("shape")
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


def _dense_shapes(out_features: int, in_features: int, rank: int) -> dict[str, Shape]:
    return {"inner.weight": (out_features, in_features)}


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
"""Storage kind -> layout with native numbers. A new kind is one row and one layer class."""


_DENSE = Layout(
    "dense",
    "spectrim.layers.quantized:QuantizedDense",
    weight_key="inner.weight",
    bias_key="inner.bias",
    shapes=_dense_shapes,
    sides=None,
)
"""A target that was not cut; with native numbers it is an ordinary layer and has no layout."""


def matrix_tensors(rows: int, columns: int, weights: str) -> dict[str, tuple[Shape, str]]:
    """The tensors of one matrix in an integer format: name -> (shape, int8|uint8|fp32|bf16).

    Raises:
        ArtifactError: an unknown number format.
    """
    if weights == "int8":
        return {"codes": ((rows, columns), "int8"), "scale": ((rows,), "fp32")}
    if weights != "int4":
        raise ArtifactError(f"unknown weights {weights!r}; expected native, int8 or int4")
    groups = -(-columns // INT4_GROUP)
    return {
        "codes": ((rows, groups * INT4_GROUP // 2), "uint8"),
        "scale": ((rows, groups), "bf16"),
        "zero": ((rows, groups), "bf16"),
    }


def layout_of(kind: str, weights: str = "native") -> Layout:
    """The layout of a storage kind and number format.

    Raises:
        ArtifactError: an unknown kind or format; names the known ones.
    """
    base = _DENSE if kind == "dense" and weights != "native" else LAYERS.get(kind)
    if base is None:
        raise ArtifactError(
            f"unknown storage {kind!r}; this version of spectrim knows {', '.join(sorted(LAYERS))}"
        )
    return base if weights == "native" else _with_integers(base, weights)


def _with_integers(base: Layout, weights: str) -> Layout:
    """The layout whose every matrix is stored in an integer format."""

    def shapes(out_features: int, in_features: int, rank: int) -> dict[str, Shape]:
        found: dict[str, Shape] = {}
        for key, shape in base.shapes(out_features, in_features, rank).items():
            part, _, last = key.rpartition(".")
            if last != "weight":
                found[key] = shape
                continue
            rows, columns = shape
            for name, (stored, _) in matrix_tensors(rows, columns, weights).items():
                found[f"{part}.{name}"] = stored
        return found

    return replace(
        base,
        weight_key=base.weight_key.removesuffix("weight") + "scale",
        shapes=shapes,
        sides=None,
        weights=weights,
    )

"""What each storage kind looks like: its parts, their shapes, and their names on disk.

A compressed linear layer keeps a few tensors under its module path. One of them, the *weight key*,
is written to disk under the original name `<linear>.weight`; its shape always differs from the
dense shape, so that a loader that does not know spectrim stops at a shape mismatch instead of
inventing random weights for a missing key. The bias keeps its original name as well.

The matrices of a kind are its *parts*. Every part has a number format (`spectrim.formats`), which
says what tensors it consists of; formats are named for all parts at once, `int4`, or one by one,
`int4+int8`. A kind is one file, its layer class, and one row here.

This file is data only and imports no torch: `spectrim inspect` reads headers with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from spectrim.errors import ArtifactError
from spectrim.formats import NumberFormat, formats_of

Shape = tuple[int, ...]

Parts = Callable[[Any, Any, Any], dict[str, tuple[Any, Any]]]
"""(out, in, rank) -> part -> (rows, columns); ranks may be an array."""

ORDER_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """One storage kind, with the number formats of its parts.

    Attributes:
        kind: the word used in plans and in `config.json`.
        location: `module:class` of the layer, imported only when a layer is built.
        parts: its matrices; the first one's main tensor is stored as `<linear>.weight`.
        bias_key: path below the layer of the bias, stored as `<linear>.bias`.
        sides: shapes of native parts by path below the layer -> (out, in, rank); None where they
            do not tell.
        orders: (out, in) -> path -> length, of the tensors that hold a permutation.
        low_rank: whether the kind has a rank.
        whole: whether every component is kept, so that nothing is lost but by rounding.
        ranks: that are offered; any where empty.
        automatic: whether the storage `auto` chooses among it and others.
        weights: number formats, see `formats_of`.
    """

    kind: str
    location: str
    parts: Parts
    bias_key: str
    sides: Callable[[Mapping[str, Shape]], tuple[int, int, int]] | None = None
    orders: Callable[[int, int], dict[str, int]] = lambda out_features, in_features: {}
    low_rank: bool = True
    whole: bool = False
    ranks: tuple[int, ...] = ()
    automatic: bool = True
    weights: str = "native"

    def layer_class(self) -> Any:
        """The `nn.Module` class of this kind."""
        module, _, name = self.location.partition(":")
        return getattr(import_module(module), name)

    @property
    def formats(self) -> dict[str, NumberFormat]:
        """Part -> its number format."""
        parts = list(self.parts(2, 2, 1))
        return dict(zip(parts, formats_of(self.weights, len(parts)), strict=True))

    @property
    def coded(self) -> bool:
        """Whether any part holds codes."""
        return any(one.coded for one in self.formats.values())

    @property
    def told_apart(self) -> bool:
        """Whether no loader can take its weight key for the dense weight, whatever the rank."""
        return not self.whole or next(iter(self.formats.values())).coded

    @property
    def states_shape(self) -> bool:
        """Whether a table says (out, in), since the shapes of the tensors do not."""
        return self.sides is None or self.coded

    @property
    def weight_key(self) -> str:
        """Path below the layer of the tensor that is stored as `<linear>.weight`."""
        part, first = next(iter(self.formats.items()))
        return f"{part}.{first.main}"

    @property
    def integers(self) -> frozenset[str]:
        """Paths below the layer whose tensors hold a permutation."""
        return frozenset(self.orders(2, 2))

    def shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, Shape]:
        """Path below the layer -> shape, of every tensor but the bias."""
        found: dict[str, Shape] = {}
        parts = self.parts(out_features, in_features, rank)
        for (part, (rows, columns)), one in zip(parts.items(), self.formats.values(), strict=True):
            for name, (shape, _) in one.tensors(rows, columns).items():
                found[f"{part}.{name}"] = shape
        orders = self.orders(out_features, in_features)
        return found | {path: (length,) for path, length in orders.items()}

    def bytes(self, out_features: int, in_features: int, rank: Any, dtype_bytes: int) -> Any:
        """Stored bytes without the bias; the rank may be an array of ranks."""
        parts = self.parts(out_features, in_features, rank)
        total: Any = 0 * rank
        for (rows, columns), one in zip(parts.values(), self.formats.values(), strict=True):
            total = total + one.bytes(rows, columns, dtype_bytes)
        return total + ORDER_BYTES * sum(self.orders(out_features, in_features).values())

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
            KeyError: a tensor of this layout is absent, or shapes do not tell.
            ValueError: a shape has the wrong number of axes.
        """
        memory = {disk: key for key, disk in self.renames().items()}
        if self.sides is None or self.states_shape:
            raise KeyError("shape")
        return self.sides({memory.get(key, key): shape for key, shape in disk_shapes.items()})


def _factored_sides(shapes: Mapping[str, Shape]) -> tuple[int, int, int]:
    out_features, _ = shapes["up.weight"]
    rank, in_features = shapes["down.weight"]
    return out_features, in_features, rank


def _packed_parts(m: Any, n: Any, k: Any) -> dict[str, tuple[Any, Any]]:
    # The pivots lie on the smaller side (`linalg.pivot.packed_side`), so the shapes tell the side.
    if m <= n:
        return {"basis": (k, n), "coefficients": (m - k, k)}
    return {"basis": (m, k), "coefficients": (k, n - k)}


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
        row.kind: row
        for row in (
            Layout(
                "dense",
                "spectrim.layers.dense:QuantizedDense",
                lambda m, n, k: {"inner": (m, n)},
                "inner.bias",
                low_rank=False,
                whole=True,
                automatic=False,
            ),
            Layout(
                "factored",
                "spectrim.layers.lowrank:LowRankLinear",
                lambda m, n, k: {"up": (m, k), "down": (k, n)},
                "up.bias",
                sides=_factored_sides,
            ),
            Layout(
                "packed",
                "spectrim.layers.packed:PackedLinear",
                _packed_parts,
                "bias",
                sides=_packed_sides,
                orders=lambda m, n: {"order": min(m, n)},
            ),
            Layout(
                "residual",
                "spectrim.layers.residual:ResidualLinear",
                lambda m, n, k: {"base": (m, n), "up": (m, k), "down": (k, n)},
                "base.bias",
                whole=True,
                ranks=(2, 4, 8, 16, 32),
                automatic=False,
            ),
        )
    }
)
"""Storage kind -> layout with native numbers. `dense` with them is an ordinary layer: no layer of
ours, and no entry of a table."""


def layout_of(kind: str, weights: str = "native") -> Layout:
    """The layout of a storage kind and number formats.

    Raises:
        ArtifactError: an unknown kind or format; names the known ones.
    """
    base = LAYERS.get(kind)
    if base is None:
        raise ArtifactError(
            f"unknown storage {kind!r}; this version of spectrim knows {', '.join(sorted(LAYERS))}"
        )
    found = base if weights == base.weights else replace(base, weights=weights)
    formats_of(weights, len(found.parts(2, 2, 1)))
    return found


def known_kind(kind: str) -> str:
    """The kind itself, if cut matrices can be stored so; `auto` is the smallest of some.

    Raises:
        ValueError: they cannot; quotes what is known.
    """
    return _known(kind, [*(name for name, layout in LAYERS.items() if not layout.whole), "auto"])


def known_storage(kind: str) -> str:
    """The kind itself, if a recipe may ask for it: also `dense` and `residual`, which cut nothing.

    Raises:
        ValueError: it may not; quotes what is known.
    """
    return _known(kind, [*LAYERS, "auto"])


def _known(kind: str, known: Sequence[str]) -> str:
    if kind not in known:
        expected = ", ".join(map(repr, known))
        raise ValueError(f"{kind!r} is unknown; expected one of {expected}")
    return kind

"""What `config.json` says about a compressed model, validated and bounded before anything uses it.

The `quantization_config` of a result names every compressed layer, relative to the base model, with
its rank and storage, the targets that stayed dense, and where the result comes from. Files come
from strangers: names, numbers and sizes are checked here, and nothing in the file becomes a path
or code. Unknown keys are kept, so that a file survives a round trip through an older spectrim of
the same format version. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from spectrim.errors import ArtifactError
from spectrim.layers.layout import layout_of
from spectrim.storage.strict import (
    MOST_TARGETS,
    Name,
    Side,
    Strict,
    Text,
    check_nesting,
    check_version,
    checked,
)

QUANT_METHOD = "spectrim"
FORMAT_VERSION = 1


class LayerEntry(BaseModel):
    """How one compressed layer is stored.

    Attributes:
        rank: components kept; None for a target that was not cut but has coded weights.
        storage: a kind of `layers.layout`.
        weights: number formats of its parts, joined by `+` where they differ.
        shape: (out, in), with coded weights, whose tensors do not tell.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    rank: Side | None = None
    storage: Annotated[str, StringConstraints(max_length=40)]
    weights: Annotated[str, StringConstraints(max_length=40)] = "native"
    shape: tuple[Side, Side] | None = None


class ExpertsEntry(Strict):
    """A 3-D parameter of experts that the result holds as one layer per expert and matrix.

    Attributes:
        experts: how many.
        shape: (out, in) of one expert's slice, all of its matrices together.
        transposed: whether the parameter is (experts, in, out).
        parts: one matrix per slice, or two: stacked or interleaved rows.
    """

    experts: Side
    shape: tuple[Side, Side]
    transposed: bool = False
    parts: Literal["whole", "stacked", "interleaved"] = "whole"


class Provenance(Strict):
    """Where a result comes from; every field may be unknown.

    Attributes:
        recipe: name of the recipe.
        recipe_hash: `Recipe.hash()`.
        keep: the fraction of target bytes that was asked for.
        base_model: name or folder of the model that was compressed.
        spectrim_version: the version that wrote the result.
    """

    recipe: Text | None = None
    recipe_hash: Text | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    base_model: Text | None = None
    spectrim_version: Text | None = None


class Table(BaseModel):
    """The whole `quantization_config` of a result.

    Attributes:
        quant_method: always `spectrim`.
        format_version: version of the on-disk format.
        layers: compressed layer, named relative to the base model -> how it is stored.
        experts: parameter of experts, named like layers -> how it was taken apart.
        left_dense: targets that kept their original weight; they count towards `keep`.
        on_disk: layers or dense targets whose path in the files does not end with their name ->
            that path.
        provenance: where the result comes from.
        dequantize: multiply the factors out right after loading.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    quant_method: Literal["spectrim"] = QUANT_METHOD
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    layers: Annotated[dict[Name, LayerEntry], Field(max_length=MOST_TARGETS)] = {}
    experts: Annotated[dict[Name, ExpertsEntry], Field(max_length=MOST_TARGETS)] = {}
    left_dense: Annotated[tuple[Name, ...], Field(max_length=MOST_TARGETS)] = ()
    on_disk: Annotated[dict[Name, Name], Field(max_length=MOST_TARGETS)] = {}
    provenance: Provenance = Provenance()
    dequantize: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data for `config.json`, unknown keys included."""
        data = self.model_dump(mode="json")
        for entry in data["layers"].values():
            # Most layers need no shape, and a large model has thousands of layers.
            if entry["shape"] is None:
                del entry["shape"]
        for optional in ("experts", "on_disk"):
            if not data[optional]:
                del data[optional]
        return data


def parse_table(data: Mapping[str, Any], *, source: str) -> Table:
    """Validate a `quantization_config`.

    Raises:
        ArtifactError: a newer format version, an unknown storage or number format, or a field
            that is missing, of the wrong type or out of bounds.
    """
    check_version(data, FORMAT_VERSION, absent=1, source=source)
    check_nesting(data, source=source)
    table = checked(Table, dict(data), source=source)
    for name, entry in table.layers.items():
        try:
            layout = layout_of(entry.storage, entry.weights)
        except ArtifactError as error:
            raise ArtifactError(f"{source}: {name}: {error}") from error
        if not layout.told_apart:
            raise ArtifactError(
                f"{source}: {name}: unknown storage {entry.storage!r} with {entry.weights} "
                "weights; a whole matrix in native numbers has no entry"
            )
        if (entry.rank is not None) != layout.low_rank:
            raise ArtifactError(
                f"{source}: {name} has rank {entry.rank}, which does not go with its storage "
                f"{entry.storage!r}"
            )
        if layout.states_shape and entry.shape is None:
            raise ArtifactError(
                f"{source}: {name} has weights {entry.weights!r} and no shape (out, in)"
            )
        if entry.shape is not None and (entry.rank or 0) > min(entry.shape):
            raise ArtifactError(
                f"{source}: {name} has rank {entry.rank}, more than its shape {entry.shape} allows"
            )
    return table

"""The elastic artifact: ordered factors and one order of components, every size by slicing.

    elastic.json          targets, limits, base checkpoint with its identity; validated
    elastic.safetensors   <target>.up (out, h), <target>.down (h, in), order.target, order.score
    recipe.yaml, spectrim_report.json, README.md
    base/                 the base checkpoint itself, in a self-contained artifact

Only components up to break-even are stored, so that the factors never take more bytes than the
dense targets; a target that is dense at some size comes from the base checkpoint. Adapters are
folded into the factors as their first components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectrim.allocate.budget import components
from spectrim.allocate.elastic import ElasticOrder
from spectrim.allocate.ladder import Limits
from spectrim.devices import HOST
from spectrim.errors import ArtifactError
from spectrim.storage.atomic import new_folder
from spectrim.storage.folder import Papers
from spectrim.storage.headers import read_header
from spectrim.storage.json_file import check_unique, read_record
from spectrim.storage.strict import LARGEST_SIDE, MOST_TARGETS, Side, Strict, Text
from spectrim.storage.target_record import TargetRecord

JSON_FILE = "elastic.json"
TENSOR_FILE = "elastic.safetensors"
BASE_FOLDER = "base"
FORMAT_VERSION = 1


class Base(Strict):
    """The checkpoint that the artifact was made from.

    Attributes:
        name: hub name or folder; `base` inside a self-contained artifact.
        identity: hash of its configuration and a sample of its weights.
        dtype: of the checkpoint, in which factors are stored and bytes are counted.
        other_bytes: of everything that is not a target.
        self_contained: whether it lies inside the artifact.
    """

    name: Text
    identity: Text
    dtype: Literal["float32", "float16", "bfloat16"]
    other_bytes: Annotated[int, Field(ge=0)]
    self_contained: bool = False


class _Target(TargetRecord):
    held: Side
    adapters: Annotated[int, Field(ge=0, le=LARGEST_SIDE)]
    least: Side


class _Limits(Strict):
    floor: Annotated[float, Field(ge=0, lt=1)]
    multiple: Side


class _Record(Strict):
    kind: Literal["elastic"] = "elastic"
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    source: Text
    base: Base
    limits: _Limits
    targets: Annotated[tuple[_Target, ...], Field(min_length=1, max_length=MOST_TARGETS)]


@dataclass(frozen=True, eq=False)
class Elastic:
    """An artifact in memory.

    Attributes:
        order: which component goes first, and every size.
        factors: target -> `up (out, h)`, `down (h, in)`, most important component first.
        base: the checkpoint that dense targets and everything else come from.
        source: what the order was made by: `acip`, `kfac`, ...
        folder: where it lies, None while it is only in memory.
    """

    order: ElasticOrder
    factors: Mapping[str, tuple[Tensor, Tensor]]
    base: Base
    source: str
    folder: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return getattr(torch, self.base.dtype)


def is_elastic(folder: str | Path) -> bool:
    """Whether a folder is an elastic artifact."""
    return (Path(folder) / JSON_FILE).is_file()


def save_elastic(
    elastic: Elastic,
    output: str | Path,
    papers: Papers,
    *,
    base_model: Any = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write an artifact, completely or not at all.

    Args:
        elastic: what to write; factors are cast to the base's dtype.
        output: a new or empty folder, or an artifact with `overwrite`.
        papers: what lies beside the tensors.
        base_model: the original `PreTrainedModel`, to be stored inside; None names it only.
        tokenizer: stored beside the base model.
        overwrite: replace the artifact that is there.

    Raises:
        OutputError: the destination is taken or cannot be written; nothing is left there.
    """
    tensors = {
        "order.target": torch.from_numpy(elastic.order.target).to(_index(len(elastic.factors))),
        # The order itself is exact; scores only explain it, and four bytes a component are many.
        "order.score": torch.from_numpy(elastic.order.score).to(torch.bfloat16),
    }
    for name, (up, down) in elastic.factors.items():
        tensors[f"{name}.up"] = up.detach().to(HOST, elastic.dtype).contiguous()
        tensors[f"{name}.down"] = down.detach().to(HOST, elastic.dtype).contiguous()
    with new_folder(output, overwrite=overwrite) as folder:
        save_file(tensors, str(folder / TENSOR_FILE), metadata={"format": "pt"})
        record = _record(elastic, self_contained=base_model is not None)
        (folder / JSON_FILE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        papers.write(folder)
        if base_model is not None:
            base_model.save_pretrained(folder / BASE_FOLDER)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / BASE_FOLDER)


def load_elastic(folder: str | Path) -> Elastic:
    """Read and check an artifact; the base checkpoint is not touched.

    Raises:
        ArtifactError: it is damaged, contradictory or from a newer version; names what.
    """
    folder = Path(folder)
    record = read_record(folder / JSON_FILE, _Record, FORMAT_VERSION)
    limits = Limits(
        dtype_bytes=getattr(torch, record.base.dtype).itemsize,
        floor=record.limits.floor,
        multiple=record.limits.multiple,
    )
    wanted = {f"{t.name}.{part}" for t in record.targets for part in ("up", "down")}
    tensors = _read_tensors(folder / TENSOR_FILE, wanted | {"order.target", "order.score"})
    factors = {}
    for target in record.targets:
        shapes = {
            "up": (target.out_features, target.held),
            "down": (target.held, target.in_features),
        }
        up, down = (
            _take(tensors, f"{target.name}.{part}", shape, record.base.dtype, folder)
            for part, shape in shapes.items()
        )
        if not (up.isfinite().all() and down.isfinite().all()):
            raise ArtifactError(
                f"{folder / TENSOR_FILE}: the factors of {target.name} hold numbers that are not "
                "finite"
            )
        factors[target.name] = (up, down)
    index = str(_index(len(record.targets))).removeprefix("torch.")
    removals = sum(t.held + 1 for t in record.targets)
    order = ElasticOrder(
        curves=tuple(t.curve(energy=np.ones(t.held + 1)) for t in record.targets),
        target=_take(tensors, "order.target", (removals,), index, folder).int().numpy(),
        score=_take(tensors, "order.score", (removals,), "bfloat16", folder).float().numpy(),
        adapters=tuple(t.adapters for t in record.targets),
        least=tuple(t.least for t in record.targets),
        limits=limits,
    )
    _check(order, record, folder)
    return Elastic(order, factors, record.base, record.source, folder)


def _index(targets: int) -> torch.dtype:
    """The smallest integers that count the targets."""
    return torch.int16 if targets <= torch.iinfo(torch.int16).max else torch.int32


def _record(elastic: Elastic, *, self_contained: bool) -> _Record:
    order = elastic.order
    rows = zip(order.curves, order.held, order.adapters, order.least, strict=True)
    return _Record(
        source=elastic.source,
        base=elastic.base.model_copy(update={"self_contained": self_contained}),
        limits=_Limits(floor=order.limits.floor, multiple=order.limits.multiple),
        targets=tuple(
            _Target.of(curve, held=held, adapters=adapters, least=least)
            for curve, held, adapters, least in rows
        ),
    )


def _read_tensors(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The tensors that the record asks for, out of a file that is whole."""
    present = wanted & read_header(path).keys()
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in present}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _take(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: str, folder: Path
) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != shape or found.dtype != getattr(torch, dtype):
        what = "absent" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise ArtifactError(f"{folder / TENSOR_FILE}: {name} is {what}, expected {shape} {dtype}")
    return found


def _check(order: ElasticOrder, record: _Record, folder: Path) -> None:
    """What the schema cannot say: counts that have to agree with one another."""
    check_unique((t.name for t in record.targets), folder / JSON_FILE)
    inside = (order.target >= 0) & (order.target < len(record.targets))
    counts = np.bincount(order.target[inside], minlength=len(record.targets))
    for target, curve, count in zip(record.targets, order.curves, counts, strict=True):
        most = components(curve.shape)
        ranks = max(target.least, target.adapters)
        if count != target.held + 1 or target.held > most or ranks > target.held:
            raise ArtifactError(
                f"{folder}: {target.name} holds {target.held} of at most {most} components, its "
                f"least rank is {target.least}, {target.adapters} are adapters and the order "
                f"removes {count}: these do not agree"
            )
    if np.isnan(order.score).any():
        raise ArtifactError(f"{folder / TENSOR_FILE}: order.score holds NaN")

"""The dense model in integers: what low rank must be held against at equal bytes.

Every target is rounded to nearest in one integer format and none is cut; embeddings, norms and head
stay as they are, as they do in every other point of a curve.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spectrim.allocate.budget import Shape, layer_bytes
from spectrim.errors import InputError
from spectrim.evaluate.points import CurvePoint, dense_name
from spectrim.formats import FORMATS
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.quantized import QuantizedLinear
from spectrim.layers.swap import swap_in
from spectrim.model.anatomy import Anatomy
from spectrim.model.weights import get_module, read_bias, read_weight
from spectrim.recipe import Recipe, StorageChoice
from spectrim.run.opening import open_job, other_bytes
from spectrim.studies.reference import Measured, PointStore, Reference, Size

REFERENCES = tuple(name for name, row in FORMATS.items() if row.reference)
"""The formats that every comparison shows."""


def quantized_points(
    reference: Reference, formats: Sequence[str] = REFERENCES, *, store: PointStore | None = None
) -> list[CurvePoint]:
    """One point per number format, of the dense model in it.

    Args:
        reference: the dense model; copies of it are rounded.
        formats: integer formats of `spectrim.formats`.
        store: finished points.

    Raises:
        InputError: another format.
    """
    store = store or PointStore(None)
    points = []
    for weights in formats:
        if weights not in FORMATS or not FORMATS[weights].coded:
            known = [name for name, row in FORMATS.items() if row.coded]
            raise InputError(f"{weights!r} keeps no codes; use {', '.join(known)}")
        storage = StorageChoice(weights=weights)
        recipe = Recipe(name=dense_name(weights), keep=1.0, storage=storage)
        key = store.key(recipe, reference, None)
        measured = store.find(key)
        if measured is None:
            measured = _measure(reference, recipe, weights)
            store.keep(key, measured)
        points.append(measured.point)
    return points


def round_targets(
    model: nn.Module, anatomy: Anatomy, weights: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Round every target to nearest, in place; returns the bytes of the targets before and after.

    Args:
        model: dense.
        anatomy: its targets.
        weights: number format.
        dtype: of the checkpoint.
    """
    before = after = 0
    size = {"storage": "dense", "dtype_bytes": dtype.itemsize}
    for target in anatomy.targets:
        layer = get_module(model, target.name)
        inner = QuantizedLinear.from_weight(
            read_weight(layer), read_bias(layer), weights, dtype=dtype
        )
        swap_in(model, target.name, QuantizedDense(inner))
        shape = Shape(target.out_features, target.in_features, target.bias)
        before += layer_bytes(shape, rank=None, **size)
        after += layer_bytes(shape, rank=None, weights=weights, **size)
    return before, after


def _measure(reference: Reference, recipe: Recipe, weights: str) -> Measured:
    dense = reference.loaded
    dtype = next(dense.model.parameters()).dtype
    started = time.perf_counter()
    model: Any = copy.deepcopy(dense.model)
    targets = open_job(replace(dense, model=model), recipe, calibrate=False).anatomy
    others = other_bytes(model, targets, dense.stored_dtype)
    before, after = round_targets(model, targets, weights, dense.stored_dtype)
    model.to(dtype)
    size = Size(
        keep=after / before,
        target_bytes=after,
        dense_target_bytes=before,
        model_bytes=after + others,
        target_weights=sum(t.out_features * t.in_features for t in targets.targets),
    )
    seconds = time.perf_counter() - started
    return reference.measure(model, size, recipe=recipe.name, seconds=seconds)

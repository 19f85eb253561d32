"""A survey on disk: small numbers apart from large factors, so that planning reads only the small.

    survey.json           key, shapes, facts, sensitivities
    curves.safetensors    per target: energy, score, losses by score (fp64)
    factors.safetensors   per target: up, down (fp32)

Everything a stranger could have put there is validated before use: sizes, names, shapes, finite
numbers. Planning imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from spectrim.allocate.budget import components
from spectrim.allocate.curve import Curve, as_numpy
from spectrim.errors import ArtifactError
from spectrim.storage.atomic import new_folder
from spectrim.storage.headers import read_header
from spectrim.storage.json_file import as_json, check_unique, read_record
from spectrim.storage.strict import MOST_TARGETS, Finite, Name, Strict, Text
from spectrim.storage.survey_record import Factors, Survey, SurveyKey
from spectrim.storage.target_record import TargetRecord

if TYPE_CHECKING:
    from spectrim.storage.tensor_file import Slot

SURVEY_FILE = "survey.json"
CURVES_FILE = "curves.safetensors"
FACTORS_FILE = "factors.safetensors"
FORMAT_VERSION = 1

ALIKE = ("key", "model_name", "dtype_bytes", "other_bytes", "recipe", "notes")
"""What `survey.json` says of a survey as it is."""

ROUNDING = ".rounding "
"""Between a target and a form (`Form.key`) in the names of losses of rounding."""

BESIDE = ("total", "irreducible", "reference", "lossless", "group")
"""What it says of a target beside its shape; the vectors lie apart."""

LossScore = Literal["second_order", "kfac"]

Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SurveyedTarget(TargetRecord):
    """One target's entry in `survey.json`."""

    total: Loss
    irreducible: Loss
    reference: tuple[Annotated[int, Field(ge=0)], Finite] | None = None
    lossless: Annotated[int, Field(ge=0)] | None = None
    group: Annotated[int, Field(ge=0)] | None = None


class Facts(Strict, extra="allow"):
    """What people read about a survey; only these two are computed with."""

    seconds: dict[Text, Finite] = Field(default={}, max_length=1000)
    sign_stability: dict[Text, Finite] | None = Field(default=None, max_length=MOST_TARGETS)


class SurveyRecord(Strict):
    """The whole of `survey.json`."""

    format_version: Literal[1]
    key: SurveyKey
    model_name: str = Field(max_length=4096)
    dtype_bytes: int = Field(ge=1, le=8)
    other_bytes: int = Field(ge=0)
    scores: tuple[LossScore, ...] = Field(max_length=8)
    recipe: dict[str, Any]
    facts: Facts
    table: tuple[tuple[Name, Finite, Finite], ...] = Field(max_length=64 * MOST_TARGETS)
    notes: tuple[Text, ...] = Field(max_length=1000)
    targets: tuple[SurveyedTarget, ...] = Field(min_length=1, max_length=MOST_TARGETS)


def is_survey(folder: str | Path) -> bool:
    """Whether a folder claims to be a survey."""
    # Not `Path.is_file`, which raises on a name that is too long for the file system.
    return os.path.isfile(Path(folder) / SURVEY_FILE)  # noqa: PTH113


def save_survey(survey: Survey, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a survey with its factors; the folder is complete or not there.

    Raises:
        OutputError: the destination is taken or cannot be written.
        ArtifactError: the survey has no key or no factors, so nothing could use it later.
    """
    from spectrim.storage.tensor_file import write_tensors

    if survey.key is None or survey.factors is None:
        raise ArtifactError("only a survey with its key and factors can be saved")
    record = SurveyRecord(
        **_values(survey, ALIKE),
        format_version=FORMAT_VERSION,
        scores=tuple(survey.losses),  # type: ignore[arg-type]
        facts=Facts.model_validate(survey.facts),
        table=tuple((name, keep, value) for (name, keep), value in survey.table.items()),
        targets=tuple(SurveyedTarget.of(c, **_values(c, BESIDE)) for c in survey.curves),
    )
    with new_folder(output, overwrite=overwrite) as folder:
        save_arrays(_arrays(survey), folder / CURVES_FILE)
        write_tensors(folder / FACTORS_FILE, list(_factor_slots(survey.factors)))
        data = record.model_dump(mode="json", exclude_unset=True)
        (folder / SURVEY_FILE).write_text(as_json(data, indent=1), encoding="utf-8")
    return Path(output)


def _factor_slots(factors: Mapping[str, Factors]) -> Iterator[Slot]:
    """Factors to be written one at a time: those of a survey out of core lie in files."""
    from spectrim.storage.tensor_file import Slot

    for name in factors:
        held = factors[name]
        for part in ("up", "down"):
            like = getattr(held, part)
            yield Slot(
                f"{name}.{part}",
                like.dtype,
                tuple(like.shape),
                lambda name=name, part=part: getattr(factors[name], part),
            )


def load_survey(folder: str | Path) -> Survey:
    """The numbers of a survey, without its factors: enough for every plan, and quick.

    Raises:
        ArtifactError: not a survey, damaged, or of another format version.
    """
    folder = Path(folder)
    if not is_survey(folder):
        raise ArtifactError(f"{folder} is no survey: it has no {SURVEY_FILE}")
    record = read_record(folder / SURVEY_FILE, SurveyRecord, FORMAT_VERSION)
    check_unique((target.name for target in record.targets), folder / SURVEY_FILE)
    try:
        odd = [e.name for e in read_header(folder / CURVES_FILE).values() if e.dtype != "F64"]
        if odd:
            raise ArtifactError(f"{folder / CURVES_FILE}: {odd[0]!r} does not hold fp64 numbers")
        arrays = load_arrays(folder / CURVES_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / CURVES_FILE} cannot be read: {error}") from error
    forms: dict[str, list[str]] = {}
    for key in arrays:
        name, found, form = key.partition(ROUNDING)
        if found:
            forms.setdefault(name, []).append(form)
    curves = tuple(_curve(t, arrays, forms.get(t.name, ()), folder) for t in record.targets)
    losses = {
        score: {c.name: _array(arrays, f"{c.name}.{score}", c.rank + 1, folder) for c in curves}
        for score in record.scores
    }
    return Survey(
        **_values(record, ALIKE),
        curves=curves,
        losses=losses,
        facts=record.facts.model_dump(mode="json", exclude_unset=True),
        table={(name, keep): value for name, keep, value in record.table},
        folder=folder,
    )


def held_ranks(survey: Survey) -> dict[str, int]:
    """How many components of every target a survey holds; of one on disk, from the file's header.

    Raises:
        ArtifactError: the survey holds none, or its file is damaged.
    """
    if survey.factors is not None:
        return {name: survey.factors[name].rank for name in survey.factors}
    if survey.folder is None:
        raise ArtifactError(f"the survey of {survey.model_name} holds no factors")
    path = survey.folder / FACTORS_FILE
    entries = read_header(path)
    ranks = {}
    for curve in survey.curves:
        up = entries.get(f"{curve.name}.up")
        if up is None or len(up.shape) != 2:
            raise ArtifactError(f"{path} does not give the factors of {curve.name}")
        ranks[curve.name] = up.shape[1]
    return ranks


def load_factors(survey: Survey, name: str) -> Factors:
    """The components of one target, from memory or from the survey's folder.

    Raises:
        ArtifactError: the survey does not hold them, or they do not fit the target.
    """
    if survey.factors is not None:
        return survey.factors[name]
    if survey.folder is None:
        raise ArtifactError(f"the survey of {survey.model_name} holds no factors")
    from safetensors import safe_open

    path = survey.folder / FACTORS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            factors = Factors(file.get_tensor(f"{name}.up"), file.get_tensor(f"{name}.down"))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} does not give the factors of {name}: {error}") from error
    shape = next(c.shape for c in survey.curves if c.name == name)
    up, down = factors.up, factors.down
    rank = up.shape[1] if up.ndim == 2 else 0
    fits = 1 <= rank <= components(shape)
    if not fits or (*up.shape, *down.shape) != (shape.out_features, rank, rank, shape.in_features):
        raise ArtifactError(
            f"{path}: the factors of {name} have sizes {tuple(up.shape)} and {tuple(down.shape)}, "
            f"not ({shape.out_features}, r) and (r, {shape.in_features}) with r from 1 to "
            f"{components(shape)}"
        )
    if not all(f.is_floating_point() and f.isfinite().all() for f in (up, down)):
        raise ArtifactError(f"{path}: the factors of {name} hold numbers that are not finite")
    return factors


def _values(of: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names}


def _arrays(survey: Survey) -> dict[str, np.ndarray]:
    """All spectra and scores by `target.what`."""
    arrays: dict[str, np.ndarray] = {}
    for curve in survey.curves:
        for what in ("energy", "score"):
            values = getattr(curve, what)
            if values is not None:
                arrays[f"{curve.name}.{what}"] = as_numpy(values)
        for form, values in (curve.rounding or {}).items():
            arrays[f"{curve.name}{ROUNDING}{form}"] = as_numpy(values)
        for score, losses in survey.losses.items():
            arrays[f"{curve.name}.{score}"] = losses[curve.name]
    return arrays


def _curve(
    target: SurveyedTarget, arrays: dict[str, np.ndarray], forms: Iterable[str], folder: Path
) -> Curve:
    energy = _array(arrays, f"{target.name}.energy", None, folder)
    most = min(target.out_features, target.in_features)
    if not 1 <= energy.size <= most:
        raise ArtifactError(
            f"{folder}: {target.name} has {energy.size} energies for at most {most} components"
        )
    scored = f"{target.name}.score" in arrays
    score = _array(arrays, f"{target.name}.score", energy.size, folder) if scored else None
    rounding = {
        form: _array(arrays, f"{target.name}{ROUNDING}{form}", None, folder) for form in forms
    }
    for form, values in rounding.items():
        if values.size not in (1, energy.size + 1):
            raise ArtifactError(
                f"{folder}: {target.name} has {values.size} losses of rounding to {form!r} for "
                f"{energy.size} components"
            )
    known = _values(target, BESIDE)
    return target.curve(energy=energy, score=score, rounding=rounding or None, **known)


def _array(
    arrays: dict[str, np.ndarray], name: str, length: int | None, folder: Path
) -> np.ndarray:
    """One vector of finite numbers of the expected length."""
    values = arrays.get(name)
    if values is None or values.ndim != 1 or length not in (None, values.size):
        found = "nothing" if values is None else f"shape {values.shape}"
        raise ArtifactError(f"{folder / CURVES_FILE}: {name!r} holds {found}, expected ({length},)")
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise ArtifactError(f"{folder / CURVES_FILE}: {name!r} holds numbers that are not finite")
    return values.astype(np.float64, copy=False)

"""What a survey knows: whose it is, every target's spectrum and scores, and maybe the factors.

A survey is made once and answers for every size. So that it is never used for another model or
text by mistake, it carries a key: hashes of the model, the tokenizer and the windows, and those
recipe fields that its numbers depend on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from spectrim.allocate.curve import Curve, Score
from spectrim.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from torch import Tensor

Sha256 = str
Setting = str | int | float | bool | None


class SurveyKey(BaseModel):
    """What a survey's numbers depend on.

    Attributes:
        model: hash of configuration and weights.
        tokenizer: hash of the tokenizer, empty when the windows were given as tokens.
        windows: fingerprint of the calibration windows, empty for data-free objectives.
        settings: the recipe's fields that matter, by dotted name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Sha256 = Field(max_length=128)
    tokenizer: Sha256 = Field(max_length=128)
    windows: Sha256 = Field(max_length=128)
    settings: dict[str, Setting] = Field(max_length=64)

    def differences(self, other: SurveyKey) -> list[str]:
        """Names of the fields in which two keys differ."""
        names = [
            name
            for name in ("model", "tokenizer", "windows")
            if getattr(self, name) != getattr(other, name)
        ]
        absent = object()
        for name in sorted({*self.settings, *other.settings}):
            if self.settings.get(name, absent) != other.settings.get(name, absent):
                names.append(name)
        return names


@dataclass(frozen=True)
class Factors:
    """The leading components of one target, fp32: `up (out, r)`, `down (r, in)`."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Number of components held."""
        return self.up.shape[1]

    def cut(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k components as `(up (out, k), down (k, in))`."""
        if not 1 <= k <= self.rank:
            raise ValueError(f"rank {k} is outside 1..{self.rank}")
        return self.up[:, :k], self.down[:k]


@dataclass(frozen=True, eq=False)
class Survey:
    """Spectra and scores of every target of one model, in execution order.

    Attributes:
        key: what the numbers depend on; None for a survey that is used once and forgotten.
        model_name: what the user called the model.
        curves: with energies, and with first-order scores and measured KLs where known.
        losses: score name -> target name -> predicted loss at rank 0..r, nats.
        dtype_bytes: of the checkpoint's dtype.
        other_bytes: of everything that is not a target.
        recipe: the resolved recipe as plain data.
        facts: calibration protocol, seconds, sign stability: for people.
        table: (target, keep) -> perplexity with only this target cut, if it was measured.
        notes: downgrades and warnings.
        factors: target name -> leading components; None when only the numbers were loaded.
        folder: where it lies on disk, None for a survey in memory.
    """

    key: SurveyKey | None
    model_name: str
    curves: tuple[Curve, ...]
    losses: Mapping[str, Mapping[str, np.ndarray]]
    dtype_bytes: int
    other_bytes: int
    recipe: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    table: Mapping[tuple[str, float], float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    factors: Mapping[str, Factors] | None = None
    folder: Path | None = None

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that plans can be made from."""
        known: list[Score] = ["energy"]
        if all(c.score is not None for c in self.curves):
            known.append("first_order")
        if "second_order" in self.losses:
            known.append("second_order")
        if "kfac" in self.losses:
            known.append("kfac")
        if all(c.reference is not None for c in self.curves):
            known.append("measured")
        return tuple(known)

    @property
    def sign_stability(self) -> float | None:
        """Mean share of components whose first-order sign agrees between halves of the windows."""
        shares = self.facts.get("sign_stability")
        return sum(shares.values()) / len(shares) if shares else None

    def curves_for(self, score: Score) -> list[Curve]:
        """The curves with the losses of one score.

        Raises:
            InputError: the survey was made without this score.
        """
        if score not in self.scores:
            raise InputError(
                f"the survey of {self.model_name} has no score {score!r}; it has "
                f"{', '.join(self.scores)}: survey again with a recipe that asks for it"
            )
        losses = self.losses.get(score)
        if losses is None:
            return list(self.curves)
        return [replace(curve, loss=losses[curve.name]) for curve in self.curves]

    def check(self, key: SurveyKey, *, ignore: Collection[str] = ()) -> None:
        """Refuse a survey of something else.

        Args:
            key: of what the survey is to be used for.
            ignore: fields that need not agree.

        Raises:
            ArtifactError: names the fields that differ.
        """
        found = ["key"] if self.key is None else self.key.differences(key)
        differing = [name for name in found if name not in ignore]
        if differing:
            where = self.folder or self.model_name
            raise ArtifactError(
                f"the survey {where} of {self.model_name} was made for something else: it differs "
                f"in {', '.join(differing)}; survey again, or use what it was made with"
            )

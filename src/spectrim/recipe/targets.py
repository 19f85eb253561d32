"""The part of a recipe that chooses and protects targets."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from spectrim.layers.layout import known_kind
from spectrim.recipe.section import Section


class OwnChoice(Section):
    """What some targets get whatever the rule says; the others share what remains."""

    match: str = Field(min_length=1, description="pattern on target names, `*` fits dots too")
    keep: float | None = Field(default=None, gt=0, le=1, description="1 leaves them dense")
    rank: int | None = Field(default=None, ge=1)
    storage: Annotated[str, AfterValidator(known_kind)] | None = None

    @model_validator(mode="after")
    def _one_size(self) -> OwnChoice:
        if self.keep is not None and self.rank is not None:
            raise ValueError("give a keep or a rank, not both")
        if self.keep is None and self.rank is None and self.storage is None:
            raise ValueError("give a keep, a rank or a storage")
        return self


class Targets(Section):
    """Which targets are compressed, and which of them get something of their own.

    Patterns are those of file names, on full module paths. Of several `own` entries the first that
    fits counts.
    """

    only: tuple[str, ...] = Field(default=(), description="compress these alone; all if empty")
    skip: tuple[str, ...] = Field(default=(), description="protect these")
    own: tuple[OwnChoice, ...] = ()
    partly: bool = Field(
        default=False, description="go on where most of the blocks' weights can be no targets"
    )

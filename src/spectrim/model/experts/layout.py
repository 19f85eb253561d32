"""How a 3-D parameter holds the matrices of its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Parts = Literal["whole", "stacked", "interleaved"]
"""One matrix per expert, or two: one after the other, or row by row in turn."""

PARTS = ("gate", "up")
"""Names of the first and the second matrix of an expert that has two in one parameter."""


@dataclass(frozen=True)
class ExpertLayout:
    """Shape and meaning of a parameter of E experts.

    Attributes:
        experts: E.
        out_features: rows of one expert's matrix in (out, in) orientation, all parts together.
        in_features: its columns.
        transposed: True where the parameter is (E, in, out), False where it is (E, out, in).
        parts: whether the outputs are one matrix's or two matrices'.
    """

    experts: int
    out_features: int
    in_features: int
    transposed: bool
    parts: Parts

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the parameter."""
        m, n = self.out_features, self.in_features
        return (self.experts, n, m) if self.transposed else (self.experts, m, n)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of an expert's linear layers below its own module; empty for a single one."""
        return () if self.parts == "whole" else PARTS

    def split(self, parameter: Tensor, expert: int) -> tuple[Tensor, ...]:
        """The matrices of one expert as (out, in), views of the parameter."""
        W = parameter[expert].mT if self.transposed else parameter[expert]
        if self.parts == "whole":
            return (W,)
        if self.parts == "stacked":
            return tuple(W.chunk(2))
        return W[0::2], W[1::2]

    def joined(self, matrices: tuple[Tensor, ...]) -> Tensor:
        """The inverse of `split`: one expert's slice of the parameter."""
        if self.parts == "interleaved":
            W = torch.stack(matrices, 1).flatten(0, 1)
        else:
            W = torch.cat(matrices)
        return W.mT if self.transposed else W

    def outputs(self, results: tuple[Tensor, ...]) -> Tensor:
        """What the slice gives for tokens, (..., out), from what its matrices give."""
        if self.parts == "whole":
            return results[0]
        if self.parts == "stacked":
            return torch.cat(results, -1)
        return torch.stack(results, -1).flatten(-2)

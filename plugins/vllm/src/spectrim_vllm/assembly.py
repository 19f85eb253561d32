"""From the tensors of a checkpoint, which come one by one, to the factors of one piece.

A factored layer is stored as `weight` (its up matrix) and `down.weight`; a packed one as `weight`
(its basis), `coefficients.weight` and `order`. A packed layer becomes factors without any
arithmetic: the entries of the coefficients are copied beside an identity, so that the served layer
is as exact as the stored one. It takes k² more numbers in memory than on disk.

Plain torch; nothing here knows vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.errors import ArtifactError
from spectrim.layers.layout import layout_of
from spectrim_vllm.stacking import Piece

__all__ = ["Assembly", "packed_factors", "stored_names"]


def stored_names(storage: str) -> tuple[str, ...]:
    """Names on disk, below the layer, of the tensors of one storage kind without its bias."""
    if storage == "dense":
        return ("weight",)
    layout = layout_of(storage)
    return tuple(layout.disk_key(key) for key in layout.shapes(2, 2, 1))


def packed_factors(basis: Tensor, coefficients: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """`(up, down)` of a packed layer.

    Side out (m <= n): basis (k, n), coefficients (m-k, k), and order (m,) says for every output
    its place in [y_p; y_n]: up = [I; C][order], down = basis. Side in (m > n): basis (m, k),
    coefficients (k, n-k), and order (n,) lists the inputs of [x_p; x_n]: up = basis, and the
    columns `order` of down are [I, C].

    Raises:
        ArtifactError: the order is not a permutation.
    """
    index = order.long()
    if not torch.equal(index.sort().values, torch.arange(index.numel(), device=index.device)):
        raise ArtifactError("the order of a packed layer is not a permutation")
    # The side is told by what the coefficients share with the basis: its rows, or its columns.
    if coefficients.shape[1] == basis.shape[0] and index.numel() <= basis.shape[1]:
        k = basis.shape[0]
        identity = torch.eye(k, dtype=basis.dtype, device=basis.device)
        return torch.cat([identity, coefficients])[index], basis
    k = basis.shape[1]
    identity = torch.eye(k, dtype=basis.dtype, device=basis.device)
    down = torch.empty(k, index.numel(), dtype=basis.dtype, device=basis.device)
    down[:, index] = torch.cat([identity, coefficients], dim=1)
    return basis, down


class Assembly:
    """Collects the tensors of one piece until all of them are there.

    Args:
        piece: what is collected.
    """

    def __init__(self, piece: Piece):
        self.piece = piece
        self.complete = False
        self._held: dict[str, Tensor] = {}

    def missing(self) -> list[str]:
        """Names on disk of what has not come yet."""
        if self.complete:
            return []
        names = stored_names(self.piece.storage)
        return [f"{self.piece.name}.{name}" for name in names if name not in self._held]

    def add(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Take one tensor; with the last one, `(down, up)`, where up is None for a dense piece.

        Raises:
            ArtifactError: a tensor that the storage does not have, or shapes that do not fit.
        """
        if name not in stored_names(self.piece.storage):
            raise ArtifactError(
                f"{self.piece.name} is stored {self.piece.storage} and has no tensor {name!r}"
            )
        held = {**self._held, name: tensor}
        if len(held) < len(stored_names(self.piece.storage)):
            # A copy: some loaders hand out one buffer again and again.
            self._held[name] = tensor.detach().clone()
            return None
        self._held = {}
        self.complete = True
        factors = self._factors(held)
        shapes = {key: tuple(value.shape) for key, value in held.items()}
        self._check(*factors, shapes=shapes)
        return factors

    def _factors(self, held: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        if self.piece.storage == "dense":
            return held["weight"], None
        if self.piece.storage == "factored":
            return held["down.weight"], held["weight"]
        self._check_packed(held)
        up, down = packed_factors(held["weight"], held["coefficients.weight"], held["order"])
        return down, up

    def _check_packed(self, held: dict[str, Tensor]) -> None:
        layout = layout_of("packed")
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        try:
            m, n, k = layout.dimensions(shapes)
        except ValueError as error:
            raise ArtifactError(f"{self.piece.name}: {error}") from error
        expected = {layout.disk_key(key): s for key, s in layout.shapes(m, n, k).items()}
        if shapes != expected or held["order"].is_floating_point():
            raise ArtifactError(f"{self.piece.name}: packed tensors {shapes} do not fit together")

    def _check(
        self, down: Tensor, up: Tensor | None, *, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        fits = down.ndim == 2
        if up is not None:
            rank = self.piece.rank
            fits = fits and up.ndim == 2 and down.shape[0] == up.shape[1] == rank
        if not fits:
            raise ArtifactError(
                f"{self.piece.name}: tensors {shapes} do not fit {self.piece.storage} storage of "
                f"rank {self.piece.rank}"
            )

"""From the tensors of a checkpoint, which come one by one, to the factors of one piece.

A factored layer is stored as `weight` (its up matrix) and `down.weight`; a packed one as `weight`
(its basis), `coefficients.weight` and `order`. A packed layer becomes factors without any
arithmetic: the entries of the coefficients are copied beside an identity, so that the served layer
is as exact as the stored one. It takes k² more numbers in memory than on disk. Integers are
restored when they come: memory is that of native numbers, the file that of integers. A rounded
matrix with a correction becomes their sum, one dense matrix.

Plain torch; nothing here knows vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.errors import ArtifactError
from spectrim.layers.layout import layout_of
from spectrim_vllm.stacking import Piece

__all__ = ["Assembly", "packed_factors", "stored_tensors", "unknown_numbers"]

_DTYPES = {
    "native": None,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}


def stored_tensors(piece: Piece) -> dict[str, torch.dtype | None]:
    """Names on disk, below the layer, of a piece's tensors without its bias, with their dtypes.

    None is the dtype of the model's own numbers.
    """
    if piece.storage == "dense" and piece.weights == "native":
        return {"weight": None}
    layout = layout_of(piece.storage, piece.weights)
    found: dict[str, torch.dtype | None] = {
        layout.disk_key(path): torch.int32 for path in layout.orders(2, 2)
    }
    for part, one in layout.formats.items():
        for name, (_, number) in one.tensors(2, 2).items():
            found[layout.disk_key(f"{part}.{name}")] = _DTYPES[number]
    return found


def unknown_numbers(piece: Piece) -> list[str]:
    """Kinds of numbers in a piece's tensors that no dtype is known for here."""
    formats = layout_of(piece.storage, piece.weights).formats.values()
    kinds = {number for one in formats for _, number in one.tensors(2, 2).values()}
    return sorted(kinds - set(_DTYPES))


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
        names = stored_tensors(self.piece)
        return [f"{self.piece.name}.{name}" for name in names if name not in self._held]

    def add(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Take one tensor; with the last one, `(down, up)`, where up is None for a whole piece.

        Raises:
            ArtifactError: a tensor that the storage does not have, or shapes that do not fit.
        """
        if name not in stored_tensors(self.piece):
            raise ArtifactError(
                f"{self.piece.name} is stored {self.piece.storage} and has no tensor {name!r}"
            )
        held = {**self._held, name: tensor}
        if len(held) < len(stored_tensors(self.piece)):
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
        if self.piece.weights != "native":
            held = self._restored(held)
        if self.piece.storage == "dense":
            return held["weight"], None
        if self.piece.storage == "residual":
            return held["weight"] + held["up.weight"] @ held["down.weight"], None
        if self.piece.storage == "factored":
            return held["down.weight"], held["weight"]
        self._check_packed(held)
        up, down = packed_factors(held["weight"], held["coefficients.weight"], held["order"])
        return down, up

    def _restored(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the same layer has in native numbers, fp32."""
        piece = self.piece
        assert piece.shape is not None  # the table has it wherever there are integers
        m, n = piece.shape
        k = piece.rank or 0
        layout, native = layout_of(piece.storage, piece.weights), layout_of(piece.storage)
        expected = {layout.disk_key(key): s for key, s in layout.shapes(m, n, k).items()}
        found = {name: tuple(tensor.shape) for name, tensor in held.items()}
        if found != expected:
            raise ArtifactError(
                f"{piece.name}: tensors {found} do not fit {piece.storage} {piece.weights} storage "
                f"of a layer {piece.shape} of rank {piece.rank}"
            )
        restored = {name: held[name] for name in layout.orders(m, n)}
        for part, one in layout.formats.items():
            tensors = {name: held[layout.disk_key(f"{part}.{name}")] for name in one.tensors(m, n)}
            _, columns = layout.parts(m, n, k)[part]
            matrix = one.decode(tensors, columns).float()
            restored[native.disk_key(f"{part}.weight")] = matrix
        return restored

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

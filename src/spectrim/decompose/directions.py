"""Ordered output directions: the one construction behind every objective.

For `min_{rank W' ≤ k} tr((W − W') C (W − W')ᵀ)` the answer is `W' = U_k U_kᵀ W` with `U_k` the
leading eigenvectors of `W C Wᵀ`: no root of `C`, no inverse, and one eigenproblem serves every
rank (AA-SVD, arXiv 2604.02119; Swift-SVD, arXiv 2604.01609). Three refinements are ours:

- a tall `W` is first reduced to its column space, so that the eigenproblem has the smaller side;
- energies are Rayleigh quotients of the computed factors, `e_i = a_i C a_iᵀ` with `a_i = u_iᵀ W`.
  For orthonormal `U` the error at rank k is exactly the sum of the energies left out, also where
  the eigenvalues themselves have drowned in rounding;
- directions without energy (fewer calibration tokens than channels, dead channels) are ordered as
  if every channel were worth the same (`linalg.psd.channel_prior`), which is the limit of little
  shrinkage. Of all optimal answers `U_k U_kᵀ W` is the nearest to `W`, so what calibration never
  saw is kept as far as the rank allows, and full rank returns `W` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.linalg.psd import symmetric_eigh, symmetric_eigvals
from spectrim.linalg.truncated import column_space, core_of
from spectrim.tolerances import RANK_CUTOFF_FP64


def weighed(rows: Tensor, C: Tensor | None) -> Tensor:
    """`rows · C` where `C` is a matrix, a diagonal given as a vector, or None for the identity."""
    if C is None:
        return rows
    return rows * C if C.ndim == 1 else rows @ C


def checked_rank(W: Tensor, rank: int | None, *, name: str) -> int:
    """How many components to hold: all by default.

    Raises:
        ValueError: outside 1..min(out, in).
    """
    full = min(W.shape)
    if rank is not None and not 1 <= rank <= full:
        raise ValueError(f"{name}: rank {rank} is outside 1..{full}")
    return full if rank is None else rank


def _ordered_directions(
    core: Tensor, C: Tensor | None, sizes: Tensor, *, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal directions in which `core` is cut, with what each removes from the trace.

    Returns:
        Directions `U` (p, p), `A = Uᵀ core` (p, in) and energies (p,), descending.
    """
    S = weighed(core, C) @ core.mT
    values, U = symmetric_eigh((S + S.mT) / 2, name=name)
    seen = int((values > RANK_CUTOFF_FP64 * values[0].clamp(min=0)).sum())
    A = U.mT @ core
    if seen < U.shape[1]:
        # Any basis of the unseen directions is optimal; this one cuts `core` best.
        prior = torch.where(sizes > 0, 1 / sizes, 0.0)
        _, turn = symmetric_eigh((A[seen:] * prior) @ A[seen:].mT, name=name)
        U = torch.cat([U[:, :seen], U[:, seen:] @ turn], 1)
        A = torch.cat([A[:seen], turn.mT @ A[seen:]])
    energy = (weighed(A, C) * A).sum(1)
    head, order = energy[:seen].sort(descending=True, stable=True)
    U = torch.cat([U[:, order], U[:, seen:]], 1)
    A = torch.cat([A[order], A[seen:]])
    return U, A, torch.cat([head, _level(energy[seen:], head)]).clamp(min=0)


def _level(unseen: Tensor, head: Tensor) -> Tensor:
    """Rounding noise spread evenly, so that energies descend and still sum to what is left."""
    if not unseen.numel():
        return unseen
    share = unseen.mean()
    return (share if not head.numel() else torch.minimum(share, head[-1])).expand_as(unseen)


def projected(
    W: Tensor,
    C: Tensor | None,
    *,
    name: str,
    rank: int | None = None,
    sizes: Tensor | None = None,
    scale: float = 1.0,
    damping: float = 0.0,
) -> Decomposition:
    """Ordered components of `min scale · tr((W − W') C (W − W')ᵀ)`: `B = U`, `A = Uᵀ W`.

    Args:
        W: weight in fp64, (out, in).
        C: second moment (in, in), its diagonal (in,), or None for the identity.
        name: the target, for messages.
        rank: components to hold, min(out, in) by default; the numbers cover all of them. With 0
            no vector is computed, and the energies are eigenvalues.
        sizes: of the channels, as `channel_prior` takes them, (in,); by default the squared
            norms of the columns of `W`, or ones where `C` is None.
        scale: factor that turns the trace into the objective's units.
        damping: recorded in the result.

    Raises:
        ValueError: `rank` is outside 0..min(out, in).
        NumericalError: the eigenproblem did not converge.
    """
    if rank == 0:
        return _spectrum(W, C, name=name, scale=scale, damping=damping)
    held = checked_rank(W, rank, name=name)
    if sizes is None:
        sizes = W.square().sum(0) if C is not None else W.new_ones(W.shape[1])
    space = column_space(W)
    U, A, energy = _ordered_directions(space.core, C, sizes, name=name)
    energy = scale * energy
    return Decomposition(
        up=space.lift(U[:, :held]),
        down=A[:held].clone(),
        energy=energy[:held].clone(),
        total=float(energy.sum()),
        damping=damping,
        tail=float(energy[held:].sum()),
    )


def _spectrum(
    W: Tensor, C: Tensor | None, *, name: str, scale: float, damping: float
) -> Decomposition:
    """The energies of `projected` without its vectors: the same numbers but for rounding."""
    core = core_of(W)
    S = weighed(core, C) @ core.mT
    values = symmetric_eigvals((S + S.mT) / 2, name=name)
    seen = int((values > RANK_CUTOFF_FP64 * values[0].clamp(min=0)).sum())
    energy = torch.cat([values[:seen], _level(values[seen:], values[:seen])]).clamp(min=0) * scale
    return Decomposition(
        up=W.new_empty(W.shape[0], 0),
        down=W.new_empty(0, W.shape[1]),
        energy=energy,
        total=float(energy.sum()),
        damping=damping,
        tail=0.0,
    )

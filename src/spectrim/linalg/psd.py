"""Positive semi-definite moment matrices: eigenvalues, roots and damped Cholesky factors, in fp64.

Calibration leaves matrices `C = Σ x xᵀ` that are symmetric only up to rounding and singular
whenever there are fewer tokens than channels, dead channels or duplicate channels. Everything
here is relative to the matrix's own scale, so that sums and means are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectrim.errors import NonFiniteError, NotPositiveDefiniteError, NumericalError
from spectrim.tolerances import (
    DAMPING_FACTOR,
    DAMPING_LIMIT,
    DAMPING_START,
    RANK_CUTOFF_FP64,
    SYMMETRY,
)


def finite(matrix: Tensor, *, name: str, what: str) -> Tensor:
    """The matrix in fp64.

    Raises:
        NonFiniteError: an entry is NaN or infinite.
    """
    # A sum is not finite if one entry is not, and is found in a fraction of the time.
    if not math.isfinite(float(matrix.sum())) and (bad := int((~torch.isfinite(matrix)).sum())):
        raise NonFiniteError(
            f"{name}: {what} of shape {tuple(matrix.shape)} holds {bad} non-finite values; "
            "expected finite numbers. Check the checkpoint and the dtype used in calibration."
        )
    return matrix.to(torch.float64)


def symmetrized(C: Tensor, *, name: str, what: str = "the moment matrix") -> Tensor:
    """`(C + Cᵀ) / 2` in fp64, after checking that `C` is finite and meant to be symmetric.

    Raises:
        ValueError: `C` is not square.
        NonFiniteError: an entry is NaN or infinite.
        NumericalError: the asymmetry is larger than rounding explains.
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise ValueError(f"{name}: {what} has shape {tuple(C.shape)}, expected a square matrix")
    C = finite(C, name=name, what=what)
    if torch.equal(C, C.mT):
        return C
    asymmetry = float(torch.linalg.norm(C - C.mT))
    if asymmetry > SYMMETRY * float(torch.linalg.norm(C)):
        raise NumericalError(
            f"{name}: {what} differs from its transpose by {asymmetry:.3g}, expected at most "
            f"{SYMMETRY:g} of its norm. It is not a sum of outer products; collect it again."
        )
    return (C + C.mT) / 2


def symmetric_eigh(C: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    """All eigenvalues, descending, and eigenvectors with a fixed sign, of a symmetric fp64 matrix.

    The entry of largest magnitude of each eigenvector is positive, so that equal input gives
    equal factors on every backend.

    Raises:
        NumericalError: the eigenvalue solver did not converge.
    """
    try:
        values, vectors = torch.linalg.eigh(C)
    except torch.linalg.LinAlgError as error:
        raise _not_converged(C, error, name) from error
    values, vectors = values.flip(0), vectors.flip(1)
    if vectors.numel():
        peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(peaks < 0, -1.0, 1.0).to(vectors)
    return values, vectors


def symmetric_eigvals(C: Tensor, *, name: str) -> Tensor:
    """All eigenvalues, descending, of a symmetric fp64 matrix, at a third of the price.

    Raises:
        NumericalError: the eigenvalue solver did not converge.
    """
    try:
        return torch.linalg.eigvalsh(C).flip(0)
    except torch.linalg.LinAlgError as error:
        raise _not_converged(C, error, name) from error


def _not_converged(C: Tensor, error: Exception, name: str) -> NumericalError:
    return NumericalError(
        f"{name}: the eigenvalues of a {C.shape[0]} x {C.shape[0]} matrix did not converge "
        f"({error}). Check its statistics for extreme values."
    )


def channel_prior(C: Tensor, sizes: Tensor) -> Tensor:
    """Diagonal of the moment under which every channel is worth the same, as large as `C` is.

    With `sizes_j` what the layer makes of one unit in channel j (the squared norm of the column
    that reads it), `C_jj sizes_j` is what channel j is worth; the prior gives each channel the
    mean of that, `mean_i(C_ii sizes_i) / sizes_j`. Multiply a channel by d and divide its column
    by d: the entry is multiplied by d², as `C_jj` is, so that nothing depends on how a function
    is written. With equal sizes it is the mean diagonal.

    Args:
        C: symmetric positive semi-definite, (n, n).
        sizes: not negative, (n,); where nothing is read, nothing is expected.

    Returns:
        (n,), in the dtype of `C`.
    """
    sizes = sizes.to(C)
    worth = (C.diagonal() * sizes).mean()
    return (worth / sizes).masked_fill_(sizes <= 0, 0.0)


def shrunk(C: Tensor, share: float, sizes: Tensor) -> Tensor:
    """`(1 - a) C + a · diag(channel_prior(C, sizes))`.

    Raises:
        ValueError: the share is outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"shrinkage {share} is outside 0..1")
    if share == 0:
        return C
    result = (1 - share) * C
    result.diagonal().add_(share * channel_prior(C, sizes))
    return result


def cholesky_damped(
    C: Tensor, *, name: str, ridge: float = 0.0, sizes: Tensor | None = None
) -> tuple[Tensor, float]:
    """Lower Cholesky factor of `C + d · diag(prior)` for the smallest `d` that works.

    A factorisation also counts as failed if a pivot vanishes against its own diagonal entry:
    such a factor exists by luck of rounding only, and a solve with it returns noise.

    Args:
        C: symmetric positive semi-definite, (n, n).
        name: whose matrix this is, for messages.
        ridge: first `d` to try; damping escalates from there.
        sizes: of the channels, for `channel_prior`; None for the mean diagonal of `C`.

    Returns:
        The factor `L` (n, n) in fp64, and the relative damping `d`.

    Raises:
        NotPositiveDefiniteError: no damping up to `DAMPING_LIMIT` suffices.
        NonFiniteError, NumericalError: see `symmetrized`.
    """
    C = symmetrized(C, name=name)
    scale = float(C.diagonal().mean())
    damping = ridge
    prior = C.new_full((len(C),), scale) if sizes is None else channel_prior(C, sizes)
    # What nobody reads needs a pivot all the same; its size is of no consequence.
    prior = torch.where(prior > 0, prior, scale)
    own = C.diagonal().clone()
    for damping in _dampings(ridge) if scale > 0 else ():
        damped = own + damping * prior
        # In its place for the time of the call: a copy of the matrix is what memory lacks.
        C.diagonal().copy_(damped)
        try:
            L, info = torch.linalg.cholesky_ex(C)
        finally:
            C.diagonal().copy_(own)
        if pivots_hold(L, info, damped):
            return L, damping
    raise NotPositiveDefiniteError(
        f"{name}: a {C.shape[0]} x {C.shape[0]} moment matrix with mean diagonal {scale:.3g} is "
        f"not positive definite, even with a damping of {damping:.1g} of it. Use more calibration "
        "tokens, or check that this layer sees any input."
    )


def _dampings(ridge: float) -> Iterator[float]:
    yield ridge
    steps = round(math.log(DAMPING_LIMIT / DAMPING_START, DAMPING_FACTOR))
    for i in range(steps + 1):
        damping = DAMPING_START * DAMPING_FACTOR**i
        if damping > ridge:
            yield damping


def pivots_hold(L: Tensor, info: Tensor, diagonal: Tensor) -> bool:
    """Whether a matrix was factored, and no pivot has vanished against its own diagonal entry.

    Args:
        L: lower Cholesky factor, (n, n).
        info: what `cholesky_ex` says of it.
        diagonal: of the matrix, (n,).
    """
    share = L.diagonal().square() / diagonal
    return bool((share > RANK_CUTOFF_FP64).all() & (info == 0))

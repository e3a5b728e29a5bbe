"""The best weight of a rank, as a product of two thin factors, in the norm that a method measures
errors with; what is stored is made of it by pivots.py.

With ‖E‖² = ‖Lᵀ E R‖²_F for triangular L and R, the nearest weight of rank k to W is Lᵀ⁻¹ (M)_k R⁻¹,
(M)_k the truncated SVD of M = Lᵀ W R (Eckart and Young), and its error is the dropped tail Σ_{i>k}
σ_i(M)². Only the shorter side of M is decomposed, by the eigenvectors of its Gram matrix in
float64: M Mᵀ = P S² Pᵀ gives U = Lᵀ⁻¹ P_k, V = P_kᵀ Lᵀ W, and Mᵀ M = Q S² Qᵀ gives U = W R Q_k, V =
Q_kᵀ R⁻¹. In float64 that loses nothing at the precision weights are stored in, and costs a fraction
of an SVD (docs/lowrank.md); in float32 all singular values below a thousandth of the largest would
be noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from compressor.errors import NumericalError, UsageError
from compressor.formats.pivot import Pivot
from compressor.methods.pivots import by_pivots

_TRIES = 6
UNUSED = "its inputs are all zero: factored by its weight alone"
"""The note of a linear for which no metric can be made of its inputs."""


def root(gram: Tensor, damp: float) -> Tensor:
    """Lower L with L Lᵀ = gram + damp · mean(diag) · I, float64.

    Args:
        gram: `[n, n]`, positive semi-definite up to rounding.
        damp: multiplied by ten, up to a hundred thousand times, until the factorisation succeeds.

    Raises:
        NumericalError: not finite, or not positive definite even then.
    """
    wide = gram.to(torch.float64, copy=True)
    diagonal = wide.diagonal().clone()
    mean = diagonal.mean()
    if bool(torch.isfinite(wide).all()) and mean > 0:
        for step in range(_TRIES):
            wide.diagonal().copy_(diagonal + damp * 10**step * mean)
            lower, failed = torch.linalg.cholesky_ex(wide)
            if not failed:
                return lower
    raise NumericalError(
        "a Gram matrix is zero, not finite or cannot be factored: give more calibration samples or "
        "raise damp"
    )


def check_damp(damp: float) -> None:
    """Raise UsageError unless `damp` is positive."""
    if damp <= 0:
        raise UsageError(f"damp is {damp:g}; accepted: above 0")


def whiten(weight: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """M = Lᵀ W R, float64 `[out, in]`; None stands for the identity, a vector R `[in]` for a
    diagonal.
    """
    whitened = weight.double()
    if right is not None:
        whitened = whitened * right if right.dim() == 1 else whitened @ right
    return whitened if left is None else left.T @ whitened


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a float64 matrix `[out, in]`, descending, `[min(out, in)]`."""
    wide = matrix.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return _values(torch.linalg.eigvalsh(gram))


class Factors(NamedTuple):
    """W = U V, one of the products of thin factors that a weight comes near.

    Attributes:
        u: `[out, k]`, columns by descending singular value: the first r are those of rank r.
        v: `[k, in]`, its rows likewise.
        scale: `[k]`, roots of the singular values. U and V are of like size; the columns of
            U · scale are as long as those of the weight's error without them.
    """

    u: Tensor
    v: Tensor
    scale: Tensor

    def form(self, dtype: torch.dtype) -> Pivot:
        """This product as it is stored, its numbers rounded to `dtype`."""
        scale = self.scale.double()
        return by_pivots(self.u.double() * scale, self.v.double() / scale[:, None], dtype)

    def to(self, dtype: torch.dtype) -> Factors:
        """U and V rounded to `dtype`."""
        return Factors(self.u.to(dtype), self.v.to(dtype), self.scale.float())


def truncate(
    weight: Tensor, rank: int, left: Tensor | None = None, right: Tensor | None = None
) -> Pivot:
    """The weight of rank `rank` that `decompose` finds, as it is stored, in its dtype."""
    return decompose(weight, rank, left, right)[0].form(weight.dtype)


def decompose(
    weight: Tensor, rank: int, left: Tensor | None = None, right: Tensor | None = None
) -> tuple[Factors, Tensor]:
    """The nearest weight of rank `rank` to `weight` `[out, in]` in ‖Lᵀ E R‖_F, float64, and all
    singular values of M, float64, descending.

    Args:
        weight: `[out, in]`.
        rank: 1 to min(out, in).
        left: lower triangular L, float64 `[out, out]`; None for the identity.
        right: lower triangular R, float64 `[in, in]`, or the diagonal of one, `[in]`; None for the
            identity.

    Raises:
        UsageError: a rank out of range.
        NumericalError: the decomposition is not finite.
    """
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns):
        raise UsageError(
            f"rank {rank} of a weight {rows} x {columns}; accepted: 1 to {min(rows, columns)}"
        )
    whitened = whiten(weight, left, right)
    if not bool(torch.isfinite(whitened).all()):
        raise NumericalError("the weight or the statistics of its inputs are not finite")
    if rows <= columns:
        squares, vectors = torch.linalg.eigh(whitened @ whitened.T)
        basis, scale = _leading(squares, vectors, rank)
        u = basis if left is None else solve_triangular(left.T, basis, upper=True)
        v = (basis if left is None else left @ basis).T @ weight.double()
        return Factors(u * scale, v / scale[:, None], scale), _values(squares)
    squares, vectors = torch.linalg.eigh(whitened.T @ whitened)
    basis, scale = _leading(squares, vectors, rank)
    u = weight.double() @ _times(right, basis)
    v = basis.T if right is None else _over(basis.T, right)
    return Factors(u / scale, v * scale[:, None], scale), _values(squares)


def _times(right: Tensor | None, basis: Tensor) -> Tensor:
    """R Q."""
    if right is None:
        return basis
    return right[:, None] * basis if right.dim() == 1 else right @ basis


def _over(basis: Tensor, right: Tensor) -> Tensor:
    """Qᵀ R⁻¹."""
    if right.dim() == 1:
        return basis / right
    return solve_triangular(right, basis, upper=False, left=False)


def _values(squares: Tensor) -> Tensor:
    """Singular values, descending, of their squares, ascending."""
    return squares.flip(0).clamp_min(0).sqrt()


def _leading(squares: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The last `rank` eigenvectors, largest first, and the square roots of their singular values;
    of those that are zero up to rounding a millionth of the largest, of a zero matrix 1.
    """
    kept = squares[-rank:].flip(0)
    largest = float(squares[-1])
    scale = kept.clamp_min(largest * 1e-24) if largest > 0 else torch.ones_like(kept)
    return vectors[:, -rank:].flip(1), scale.pow(0.25)

"""The output error of a pruned weight as a quadratic form, shared by the refinements that lower it.

With E = W - Ŵ and G = XᵀX the error of output row r is  e_r G e_rᵀ = ‖X e_rᵀ‖²,  and the rows are
                                                         independent. What is
minimised is its damped twin, G + λI with λ = damping · mean(diag G): it has one minimum even where
fewer tokens than columns were seen, and stays closer to W in directions that calibration says
nothing about.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.stats import InputStats

_CHUNK = (
    1 << 24
)  # weights refined at once: 64 MB for each fp32 buffer of that shape, whatever the matrix


class Quadratic:
    """The damped quadratic form of one input.

    Attributes:
        gram: float32 `[in, in]`, XᵀX, not damped; shared with the statistics, never changed.
        ridge: float32 scalar tensor, λ.
        diagonal: float32 `[in]`, of G + λI; 1 where that is zero.
    """

    def __init__(self, stats: InputStats, damping: float) -> None:
        if stats.gram is None:
            raise ValueError("this refinement needs statistics with a Gram matrix")
        self.gram = stats.gram
        diagonal = self.gram.diagonal()
        self.ridge = damping * diagonal.mean()
        damped = diagonal + self.ridge
        self.diagonal = torch.where(damped > 0, damped, torch.ones_like(damped))

    def times(self, rows: Tensor) -> Tensor:
        """`rows (G + λI)`, float32 `[rows, in]`, without a damped copy of G."""
        return torch.addcmul(rows @ self.gram, rows, self.ridge)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop` and the columns from `start` on of G + λI, a copy."""
        part = self.gram[start:stop, start:].clone()
        part.diagonal().add_(self.ridge)
        return part

    def output_errors(self, weight: Tensor, pruned: Tensor) -> Tensor:
        """‖X e_rᵀ‖² of every row, float32 `[rows]`, not damped."""
        difference = weight.float() - pruned.float()
        return torch.linalg.vecdot(difference @ self.gram, difference)


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows of `weight` small enough to be refined at once."""
    rows, columns = weight.shape
    step = max(1, _CHUNK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def better_rows(quadratic: Quadratic, weight: Tensor, start: Tensor, refined: Tensor) -> Tensor:
    """`refined` in the dtype of `start`, but the rows of `start` where that did not lower the
    output error.

    This is where "never worse than its start" is made true: after the cast to the storage dtype,
    and of the error that is not damped. What rounding may have hidden counts against the refined
    row: the float32 error of e G eᵀ is at most about ε (Σ_j |e_j| √G_jj)², which only matters where
    huge weights cancel, as without damping on too few tokens. A row that became NaN or Inf is not
    better either.
    """
    refined = refined.to(start.dtype)
    doubt = (
        torch.finfo(torch.float32).eps
        * ((weight.float() - refined.float()).abs() @ quadratic.gram.diagonal().sqrt()).square()
    )
    improved = quadratic.output_errors(weight, refined) + doubt < quadratic.output_errors(
        weight, start
    )
    return torch.where(improved[:, None], refined, start)

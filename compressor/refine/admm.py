"""ADMM with the mask free: weights and mask found together, from the whole Gram matrix, instead of
one after the other.

Meng, Behdin, Wang & Mazumder, ALPS, https://arxiv.org/abs/2406.07831, section 3. With H = D(G +
λI)D scaled to a unit diagonal (D = diag(G + λI)^-1/2, so that every column counts the same when
weights are compared) and W = weight · D⁻¹, the split

    min ½‖(W - X)H½‖²  subject to  X = Z, Z legal

is solved by alternating, with a penalty ρ that grows from stage to stage

    X = (WH - V + ρZ)(H + ρI)⁻¹         Z = the legal matrix nearest to X + V/ρ         V = V + ρ(X
                                        - Z)

With a small ρ the masks still move, with a large one X and Z agree; then the mask of Z is kept and
its values are solved for as in `lsq`. Differences to the paper: the stages are fixed (no look at
the device in between, one inverse a stage and one product an iteration), and a row that did not
gain on its start keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.pattern import Pattern, keep_counts
from compressor.refine.lsq import solve
from compressor.refine.quadratic import Quadratic, better_rows, row_chunks
from compressor.stats import InputStats

NEEDS_GRAM = True
NEEDS_MOMENTS = False

_PENALTIES = (0.1, 1.0)  # ρ of the first and of the last stage, in units of the diagonal of H


@torch.no_grad()
def refine(
    weight: Tensor,
    pruned: Tensor,
    stats: InputStats,
    pattern: Pattern,
    *,
    stages: int = 10,
    steps: int = 4,
    iterations: int = 10,
    damping: float = 0.01,
) -> Tensor:
    """Choose mask and values anew, starting from those of `pruned`.

    Args:
        weight: `[out, in]`, before pruning.
        pruned: `[out, in]`, same dtype, legal: the start.
        stats: with `gram`.
        pattern: n:m or unstructured; of every row, unstructured, the share it says is pruned; as
            many as in `pruned` if exact.
        stages: values of ρ.
        steps: ADMM iterations a stage.
        iterations: conjugate-gradient steps at the end.
        damping: λ in units of the mean of the diagonal of G.

    Returns:
        `[out, in]` in the dtype of `pruned`, legal under `pattern`: no row has a larger output
        error than in `pruned`.

    Raises:
        NumericalError: the damped Gram matrix is not positive definite in float32.
    """
    quadratic = Quadratic(stats, damping)
    scale = quadratic.diagonal.sqrt()
    scaled = _scaled_gram(quadratic, scale)
    states = [
        _State(weight[rows].float() * scale, pruned[rows].float() * scale, scaled, pattern)
        for rows in row_chunks(weight)
    ]
    for stage in range(stages):
        penalty = _penalty(stage, stages)
        inverse = _inverse(scaled, penalty)
        for state in states:
            for _ in range(steps):
                state.step(inverse, penalty)
    refined = torch.empty_like(pruned)
    for rows, state in zip(row_chunks(weight), states, strict=True):
        found = state.legal / scale
        solved = solve(quadratic, weight[rows].float(), found, found != 0, iterations)
        refined[rows] = better_rows(quadratic, weight[rows], pruned[rows], solved)
    return refined


class _State:
    """What ADMM knows of some rows, in the scaled columns.

    Attributes:
        product: float32 `[rows, in]`, WH.
        legal: float32 `[rows, in]`, Z.
        dual: float32 `[rows, in]`, V.
        zeros: int64 `[rows]`, of the start; kept in every row where the pattern is an exact one.
    """

    def __init__(self, weight: Tensor, start: Tensor, gram: Tensor, pattern: Pattern) -> None:
        self.product = weight @ gram
        self.legal = start
        self.dual = torch.zeros_like(start)
        self.pattern = pattern
        self.zeros = (start == 0).sum(1)

    def step(self, inverse: Tensor, penalty: float) -> None:
        """One iteration, given (H + ρI)⁻¹ and ρ."""
        right = torch.add(self.product - self.dual, self.legal, alpha=penalty)
        pulled = torch.add(right @ inverse, self.dual, alpha=1 / penalty)  # X + V/ρ
        exact = self.pattern.zeros is not None
        self.legal = pulled * (
            keep_counts(pulled.abs(), self.zeros) if exact else self.pattern.mask(pulled.abs())
        )
        self.dual = (pulled - self.legal).mul_(penalty)  # = V + ρ(X - Z)


def _penalty(stage: int, stages: int) -> float:
    """ρ of a stage, growing geometrically."""
    first, last = _PENALTIES
    return first * (last / first) ** (stage / max(1, stages - 1))


def _scaled_gram(quadratic: Quadratic, scale: Tensor) -> Tensor:
    """D(G + λI)D with a diagonal of 1, a new tensor `[in, in]`."""
    scaled = quadratic.gram / scale
    scaled /= scale[:, None]
    scaled.diagonal().fill_(1)
    return scaled


def _inverse(scaled: Tensor, penalty: float) -> Tensor:
    """(H + ρI)⁻¹ by its Cholesky factor."""
    shifted = scaled.clone()
    shifted.diagonal().add_(penalty)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) or not bool(torch.isfinite(factor[-1, -1])):
        raise NumericalError(
            "the Gram matrix is not positive definite even with the penalty of ADMM: are the "
            "inputs finite?"
        )
    return torch.cholesky_inverse(factor)

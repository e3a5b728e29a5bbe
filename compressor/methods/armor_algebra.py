"""Block-diagonal algebra and the exact solution of one group of four: what both optimisers of ARMOR
share.

Ŵ = A S B with A = blockdiag(a), B = blockdiag(b), S 2:4. In every objective used here the loss is a
quadratic form whose Hessian with respect to S is (AᵀA) ⊗ G, G = B H Bᵀ, and whose half-gradient is
E = AᵀA S G - C, C = Aᵀ W H Bᵀ.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# a 2x2 determinant below this share of the product of its diagonal is lost in float32: it is held
# there
_SINGULAR = 1e-6


class Factors(NamedTuple):
    """One factorisation.

    Attributes:
        a: `[out / bA, bA, bA]`.
        s: `[out, in]`, zero outside the mask.
        mask: bool `[out, in]`, exactly two of every aligned group of four.
        b: `[in / bB, bB, bB]`.
    """

    a: Tensor
    s: Tensor
    mask: Tensor
    b: Tensor

    def dense(self) -> Tensor:
        """A S B, `[out, in]`."""
        return left(self.a, right(self.s, self.b))


def eye_blocks(size: int, block: int, like: Tensor) -> Tensor:
    """The identity of `size` as `[size / block, block, block]`, with the dtype and device of
    `like`.
    """
    return torch.eye(block, dtype=like.dtype, device=like.device).repeat(size // block, 1, 1)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """`[n, n]` -> its diagonal blocks `[n / size, size, size]`."""
    return (
        matrix.view(len(matrix) // size, size, -1, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )


def left(a: Tensor, x: Tensor) -> Tensor:
    """blockdiag(a) x, `[rows, columns]`."""
    return torch.bmm(a, x.reshape(len(a), a.shape[1], -1)).reshape(x.shape)


def right(x: Tensor, b: Tensor) -> Tensor:
    """X blockdiag(b), `[rows, columns]`."""
    blocks = x.reshape(len(x), len(b), -1).transpose(0, 1)
    return torch.bmm(blocks, b).transpose(0, 1).reshape(x.shape)


def select(keep: Tensor, new: Factors, old: Factors) -> Factors:
    """`new` where the 0-d bool `keep` is true, `old` otherwise, without asking the device."""
    return Factors(*(torch.where(keep, n, o) for n, o in zip(new, old, strict=True)))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is not positive: conjugate gradients
    that have arrived stay there.
    """
    tiny = torch.finfo(denominator.dtype).tiny
    return torch.where(denominator > tiny, numerator / denominator.clamp_min(tiny), 0)


def balance(factors: Factors) -> Factors:
    """The same product with unit-norm columns of A and unit-norm rows of B, the scale moved into S.

    In this gauge bfloat16 storage changes the loss by 0.3 % at most, float16 by 0.01 %.
    """
    a_norm = factors.a.norm(dim=1, keepdim=True)
    b_norm = factors.b.norm(dim=2, keepdim=True)
    a_norm, b_norm = (torch.where(n > 0, n, torch.ones_like(n)) for n in (a_norm, b_norm))
    s = factors.s * a_norm.reshape(-1, 1) * b_norm.reshape(1, -1)
    return factors._replace(a=factors.a / a_norm, s=s, b=factors.b / b_norm)


def proximal_solve(gram: Tensor, rhs: Tensor, current: Tensor) -> Tensor:
    """X of (gram + λ) X = rhs + λ current, for a batch.

    λ is 1e-6 of the mean diagonal; staying near `current` keeps the step monotone where the matrix
    is singular. A system whose factorisation fails is damped by 1e-3 instead, and one that fails
    again keeps `current`. Two factorisations cost less than asking the device whether the first one
    failed.

    Args:
        gram: `[batch, n, n]`, symmetric and positive semi-definite up to rounding.
        rhs: `[batch, n, k]`.
        current: `[batch, n, k]`.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    _, failed = torch.linalg.cholesky_ex(gram + (1e-6 * mean)[:, None, None] * eye)
    damping = (torch.where(failed > 0, 1e-3, 1e-6) * mean)[:, None, None]
    factor, failed = torch.linalg.cholesky_ex(gram + damping * eye)
    solution = torch.cholesky_solve(rhs + damping * current, factor)
    good = (failed == 0) & torch.isfinite(solution).flatten(1).all(1)
    return torch.where(good[:, None, None], solution, current)


@cache
def _pairs(device: torch.device) -> Tensor:
    """PAIRS, `[6, 2]`; kept, because copying a list to a GPU makes the host wait for everything
    before it.
    """
    return torch.tensor(PAIRS, device=device)


def pair_inverses(gram: Tensor) -> Tensor:
    """Inverses of the six 2x2 principal minors of each 4x4 matrix, as their entries 00, 01 = 10,
    11.

    Args:
        gram: `[..., 4, 4]`.

    Returns:
        `[3, 6, ...]`: the groups come last, so that what is done to all pairs at once runs over
        long rows.
    """
    first, second = _pairs(gram.device).T
    g00, g11, g01 = (
        gram[..., x, y].movedim(-1, 0)
        for x, y in ((first, first), (second, second), (first, second))
    )
    product = g00 * g11
    determinant = torch.maximum(product - g01.square(), _SINGULAR * product).clamp_min(
        torch.finfo(gram.dtype).tiny
    )
    return torch.stack((g11, -g01, g00)) / determinant


def best_pair(
    target: Tensor,
    inverses: Tensor,
    scale: Tensor,
    heat: Tensor | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best of the six pairs of each group, given all other groups; with `heat` a draw of one
    from the Boltzmann distribution of what they gain.

    A group contributes scale · s G sᵀ - 2 t sᵀ to the loss; over the values of one pair the minimum
    is -t_p G_pp⁻¹ t_pᵀ / scale, reached at t_p G_pp⁻¹ / scale.

    Args:
        target: t, `[4, ...]`.
        inverses: `pair_inverses(G)`, broadcastable to `[3, 6, ...]`.
        scale: broadcastable to `[...]`, > 0.
        heat: 0-d temperature > 0, in units of the loss; None takes the best.
        uniform: what is drawn, in [0, 1), `[...]`.

    Returns:
        values `[4, ...]`, two of them zero, and the index of the pair `[...]`.
    """
    first, second = _pairs(target.device).T
    t0, t1 = target.index_select(0, first), target.index_select(0, second)
    x0, x1 = inverses[0] * t0 + inverses[1] * t1, inverses[1] * t0 + inverses[2] * t1
    gain = (t0 * x0 + t1 * x1) / scale
    best = _argmax(gain) if heat is None or uniform is None else _draw(gain, heat, uniform)
    there, flat = best.unsqueeze(0), best.flatten()
    values = torch.zeros_like(target)
    values.scatter_(0, first.index_select(0, flat).view(there.shape), x0.gather(0, there) / scale)
    values.scatter_(0, second.index_select(0, flat).view(there.shape), x1.gather(0, there) / scale)
    return values, best


def _argmax(gain: Tensor) -> Tensor:
    """`gain.argmax(0)` for a few long rows: on a CPU torch takes 150 ns for each column, the
    comparisons 5 ns.
    """
    if gain.is_cuda:
        return gain.argmax(0)
    best, highest = torch.zeros_like(gain[0], dtype=torch.long), gain[0]
    for index in range(1, len(gain)):
        best = best.masked_fill_(gain[index] > highest, index)
        highest = torch.maximum(highest, gain[index])
    return best


def _draw(gain: Tensor, heat: Tensor, uniform: Tensor) -> Tensor:
    """For each column an index with probability ∝ exp(gain / heat), int64 `[...]`: the first whose
    cumulative weight is above `uniform` of the whole.
    """
    weights = ((gain - gain.amax(0)) / heat).exp_()
    bound = uniform * weights.sum(0)
    drawn, passed = torch.zeros_like(bound, dtype=torch.long), torch.zeros_like(bound)
    for weight in weights[:-1]:
        passed = passed + weight
        drawn += passed <= bound
    return drawn


def pair_mask(index: Tensor) -> Tensor:
    """bool `[..., 4]` of pair indices `[...]`."""
    table = torch.zeros(6, 4, dtype=torch.bool, device=index.device)
    table.scatter_(1, _pairs(index.device), True)
    return table[index]


def temperature(step: int, steps: int, start: float) -> float:
    """Linear cooling from `start` to 0 over the first 80 % of the steps, then 0."""
    return start * max(0.0, 1 - step / (0.8 * steps))

"""ARMOR under the full Hessian: min tr((W - A S B) H (W - A S B)ᵀ) by exact block coordinate
descent.

One round, every step of which lowers the loss when the temperature is zero:

    sweep   each group of four of S takes its best pair and values given all others (Gauss-Seidel)
    values  S on its mask by conjugate gradients; the Hessian is (A_iᵀA_i) ⊗ (B H Bᵀ), one system
            per block row i
    A       A_i = W_i H P_iᵀ (P_i H P_iᵀ)⁻¹ with P = S B, in closed form
    B       Σ_k Q_jᵀQ_k B_k H_kj = Q_jᵀ W H_:j with Q = A S, by conjugate gradients preconditioned
            by Q_jᵀQ_j and H_jj

The loss separates over the block rows of A, never over columns. A round costs about 12 products of
`[out, in] x [in, in]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods.armor_algebra import (
    Factors,
    best_pair,
    diagonal_blocks,
    left,
    pair_inverses,
    pair_mask,
    proximal_solve,
    ratio,
    right,
    select,
    temperature,
)

_PANEL = 128  # columns swept before their effect on all other columns is applied in one product
_ROW_TURNS = 2  # halves of the rows of a block of A that are visited one after the other


def fit(
    weight: Tensor,
    gram: Tensor,
    factors: Factors,
    *,
    rounds: int,
    anneal: float,
    generator: torch.Generator,
    wrappers: bool = True,
    cg_steps: int = 8,
    b_steps: int = 3,
) -> Factors:
    """Improve `factors` and return the best state seen, never worse than the one given.

    Args:
        weight: W, `[out, in]`, float32 or float64.
        gram: H, `[in, in]`, symmetric positive definite.
        factors: where to start.
        rounds: rounds of sweep, values, A, B.
        anneal: temperature of the first sweep, in units of the mean loss of a group; 0 makes every
            step monotone.
        generator: source of the draws and of the visiting order, on the device of `weight`.
        wrappers: False leaves A and B as they are.
        cg_steps: conjugate-gradient steps for the values of S in a round.
        b_steps: conjugate-gradient steps for B in a round.
    """
    weight_gram = weight @ gram
    current = loss(weight, gram, factors)
    best, best_loss = factors, current
    for step in range(rounds):
        share = temperature(step, rounds, anneal)
        heat = share * current * (4 / weight.numel()) if share > 0 else None
        factors = sweep(weight_gram, gram, factors, heat, generator)
        factors = solve_values(weight_gram, gram, factors, cg_steps)
        if wrappers:
            factors = solve_a(weight_gram, gram, factors)
            factors = solve_b(weight_gram, gram, factors, b_steps)
        current = loss(weight, gram, factors)
        better, broken = current < best_loss, ~torch.isfinite(current)
        best, best_loss = select(better, factors, best), torch.where(better, current, best_loss)
        factors, current = select(broken, best, factors), torch.where(broken, best_loss, current)
    return best


def loss(weight: Tensor, gram: Tensor, factors: Factors) -> Tensor:
    """tr(D H Dᵀ), D = W - A S B, 0-d."""
    difference = weight - factors.dense()
    return ((difference @ gram) * difference).sum()


def rotated_gram(gram: Tensor, b: Tensor) -> Tensor:
    """B H Bᵀ, `[in, in]`, exactly symmetric."""
    rotated = right(left(b, gram), b.transpose(1, 2))
    return (rotated + rotated.T) / 2


def _quadratic(
    weight_gram: Tensor, gram: Tensor, factors: Factors
) -> tuple[Tensor, Tensor, Tensor]:
    """AᵀA `[out / bA, bA, bA]`, G = B H Bᵀ and the half-gradient E = AᵀA S G - Aᵀ W H Bᵀ `[out,
    in]`.
    """
    a_gram = factors.a.transpose(1, 2) @ factors.a
    b_gram = rotated_gram(gram, factors.b)
    target = left(factors.a.transpose(1, 2), right(weight_gram, factors.b.transpose(1, 2)))
    return a_gram, b_gram, left(a_gram, factors.s @ b_gram) - target


def sweep(
    weight_gram: Tensor,
    gram: Tensor,
    factors: Factors,
    heat: Tensor | None,
    generator: torch.Generator,
) -> Factors:
    """Re-solve every group of S once, in random order of columns.

    Without heat a block row of A that got worse (possible only where rows share a turn) keeps its
    old state.

    Args:
        weight_gram: W H, `[out, in]`.
        gram: H, `[in, in]`.
        factors: the current state.
        heat: 0-d temperature of the draws; None for a greedy sweep.
        generator: source of the order and of the draws.
    """
    a_gram, b_gram, start = _quadratic(weight_gram, gram, factors)
    blocks, size, _ = a_gram.shape
    columns = weight_gram.shape[1]
    error, s, mask = start.clone(), factors.s.clone(), factors.mask.clone()
    groups = torch.randperm(columns // 4, generator=generator, device=weight_gram.device)
    squares = (
        b_gram.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )
    inverses = pair_inverses(squares)
    for panel in groups.split(_PANEL // 4):
        index = (panel[:, None] * 4 + torch.arange(4, device=panel.device)).flatten()
        values, choice = _sweep_panel(
            a_gram,
            b_gram[index][:, index],
            inverses[:, :, panel],
            error[:, index].view(blocks, size, -1),
            s[:, index].view(blocks, size, -1),
            heat,
            generator,
        )
        change = values.view(-1, len(index)) - s[:, index]
        error += left(a_gram, change) @ b_gram[index]
        s[:, index] = values.view(-1, len(index))
        mask[:, index] = pair_mask(choice).view(-1, len(index))
    if heat is None:
        worse = ((start + error) * (s - factors.s)).view(blocks, -1).sum(1) > 0
        worse = worse.repeat_interleave(size)[:, None]
        s, mask = torch.where(worse, factors.s, s), torch.where(worse, factors.mask, mask)
    return factors._replace(s=s, mask=mask)


def _sweep_panel(
    a_gram: Tensor,
    b_gram: Tensor,
    inverses: Tensor,
    error: Tensor,
    s: Tensor,
    heat: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """New values `[blocks, bA, columns]` and pair indices `[blocks, bA, groups]` of the columns of
    one panel.

    Args:
        a_gram: AᵀA, `[blocks, bA, bA]`.
        b_gram: G between the columns of the panel.
        inverses: `pair_inverses` of its groups, `[3, 6, groups]`.
        error: half-gradient, `[blocks, bA, columns]`; a copy that is kept up to date here.
        s: current values, `[blocks, bA, columns]`; a copy that is overwritten.
        heat: as in `sweep`.
        generator: source of the draws.
    """
    blocks, size, columns = s.shape
    turns = min(size, _ROW_TURNS)
    scale = a_gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(s.dtype).tiny)
    choice = torch.empty(blocks, size, columns // 4, dtype=torch.long, device=s.device)
    uniform = None
    if heat is not None:
        uniform = torch.rand(
            (columns // 4, blocks, size), dtype=s.dtype, device=s.device, generator=generator
        )
    for group in range(columns // 4):
        here = slice(4 * group, 4 * group + 4)
        square, local, old = b_gram[here, here], error[..., here].clone(), s[..., here].clone()
        for turn in range(turns):
            rows = slice(turn, None, turns)
            target = scale[:, rows, None] * (s[:, rows, here] @ square) - local[:, rows]
            drawn = None if uniform is None else uniform[group, :, rows]
            values, choice[:, rows, group] = best_pair(
                target.movedim(-1, 0),
                inverses[:, :, group, None, None],
                scale[:, rows],
                heat,
                drawn,
            )
            values = values.movedim(0, -1)
            local += a_gram[:, :, rows] @ ((values - s[:, rows, here]) @ square)
            s[:, rows, here] = values
        change = s[..., here] - old
        error += (a_gram @ change) @ b_gram[here]
    return s, choice


def solve_values(weight_gram: Tensor, gram: Tensor, factors: Factors, steps: int) -> Factors:
    """S on its mask by Jacobi-preconditioned conjugate gradients, one independent system per block
    row of A.
    """
    a_gram, b_gram, error = _quadratic(weight_gram, gram, factors)
    tiny = torch.finfo(error.dtype).tiny
    inverse = 1 / (a_gram.diagonal(dim1=1, dim2=2).reshape(-1, 1) * b_gram.diagonal()).clamp_min(
        tiny
    )

    def inner(x: Tensor, y: Tensor) -> Tensor:
        """<x, y> of each block row, spread over its rows: `[out, 1]`."""
        return (x * y).view(len(a_gram), -1).sum(1).repeat_interleave(a_gram.shape[1])[:, None]

    s = factors.s
    residual = -error * factors.mask
    direction = preconditioned = residual * inverse
    power = inner(residual, preconditioned)
    for _ in range(steps):
        applied = left(a_gram, direction @ b_gram) * factors.mask
        length = ratio(power, inner(direction, applied))
        s, residual = s + length * direction, residual - length * applied
        preconditioned = residual * inverse
        previous, power = power, inner(residual, preconditioned)
        direction = preconditioned + ratio(power, previous) * direction
    return factors._replace(s=s)


def solve_a(weight_gram: Tensor, gram: Tensor, factors: Factors) -> Factors:
    """The best A given S and B, exact up to the proximal damping."""
    blocks, size, _ = factors.a.shape
    product = right(factors.s, factors.b)
    transposed = product.view(blocks, size, -1).transpose(1, 2)
    normal = (product @ gram).view(blocks, size, -1) @ transposed
    rhs = weight_gram.view(blocks, size, -1) @ transposed
    solution = proximal_solve(
        (normal + normal.transpose(1, 2)) / 2, rhs.transpose(1, 2), factors.a.transpose(1, 2)
    )
    return factors._replace(a=solution.transpose(1, 2).contiguous())


def solve_b(weight_gram: Tensor, gram: Tensor, factors: Factors, steps: int) -> Factors:
    """B by conjugate gradients, preconditioned by the exact solution for one block given all
    others.
    """
    product = left(factors.a, factors.s)
    normal = product.T @ product
    blocks, size, _ = factors.b.shape
    invert_left, invert_right = (
        _damped_cholesky(diagonal_blocks(normal, size)),
        _damped_cholesky(diagonal_blocks(gram, size)),
    )

    def apply(x: Tensor) -> Tensor:
        """The diagonal blocks of QᵀQ blockdiag(x) H."""
        half = left(x, gram)
        return normal.view(blocks, size, -1) @ half.view(-1, blocks, size).transpose(0, 1)

    def precondition(x: Tensor) -> Tensor:
        return torch.cholesky_solve(
            torch.cholesky_solve(x, invert_left).transpose(1, 2), invert_right
        ).transpose(1, 2)

    b = factors.b
    rhs = product.view(-1, blocks, size).permute(1, 2, 0) @ weight_gram.view(
        -1, blocks, size
    ).transpose(0, 1)
    residual = rhs - apply(b)
    direction = preconditioned = precondition(residual)
    power = (residual * preconditioned).sum()
    for _ in range(steps):
        applied = apply(direction)
        length = ratio(power, (direction * applied).sum())
        b, residual = b + length * direction, residual - length * applied
        preconditioned = precondition(residual)
        previous, power = power, (residual * preconditioned).sum()
        direction = preconditioned + ratio(power, previous) * direction
    return factors._replace(b=torch.where(torch.isfinite(b).all(), b, factors.b))


def _damped_cholesky(matrices: Tensor) -> Tensor:
    """Cholesky factors of a batch, damped by 1e-5 of the mean diagonal: it preconditions, so it
    need not be exact.
    """
    mean = (
        matrices.diagonal(dim1=1, dim2=2)
        .mean(-1)
        .clamp_min(torch.finfo(matrices.dtype).tiny)[:, None, None]
    )
    eye = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    factor, failed = torch.linalg.cholesky_ex(matrices + 1e-5 * mean * eye)
    return torch.where((failed > 0)[:, None, None], mean.sqrt() * eye, factor)

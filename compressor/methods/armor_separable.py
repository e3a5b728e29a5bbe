"""ARMOR under a block-diagonal Hessian: min ‖W̃ - A S B̃‖², where W̃_j = W_j L_j and B̃_j = B_j
L_j, H_j = L_j L_jᵀ.

Absorbing the Hessian in B leaves a plain Frobenius fit that separates over the blocks (i, j) given
A and B̃, so every step is a batch of small problems: A and B̃ in closed form, S on its mask by
conjugate gradients with a step length per block, and a sweep over all groups of four in b / 4
steps. The Hessian diagonal of the paper is the case H_j = diag(h_j).

What is done to S, nearly all of the work, has a twin in C++ that keeps a block in the cache
(compressor_kernels/cpu/search.cpp), used for float32 on a CPU where it can be compiled. Both draw
the same numbers; they round differently.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressor.methods.armor_algebra import (
    Factors,
    best_pair,
    left,
    pair_inverses,
    pair_mask,
    proximal_solve,
    ratio,
    right,
    select,
    temperature,
)
from compressor_kernels.cpu import search

_VALUE_STEPS = 4  # conjugate-gradient steps per solve; fewer, or one solve a sweep, end in factors
_SOLVES = 2  # that cancel: their loss in float32 is as low, but rounded to bfloat16 it is not


def fit(
    target: Tensor, factors: Factors, *, iterations: int, anneal: float, generator: torch.Generator
) -> Factors:
    """Improve `factors` and return the best state seen, never worse than the one given.

    Args:
        target: W̃, `[out, in]`, float32 or float64.
        factors: where to start, b being B̃.
        iterations: sweeps, each followed by two solves of S, A and B̃.
        anneal: temperature of the first sweep, in units of the mean loss of a group; 0 makes every
            step monotone.
        generator: source of the draws and of the visiting order, on the device of `target`.
    """
    best, best_loss = factors, loss(target, factors)
    current = best_loss
    for step in range(iterations):
        share = temperature(step, iterations, anneal)
        heat = share * current * (4 / target.numel()) if share > 0 else None
        form = quadratic(target, factors)
        factors = solve_values(form, sweep(form, factors, heat, generator))
        factors = solve_b(target, solve_a(target, factors))
        for _ in range(_SOLVES - 1):
            factors = solve_values(quadratic(target, factors), factors)
            factors = solve_b(target, solve_a(target, factors))
        current = loss(target, factors)
        better, broken = current < best_loss, ~torch.isfinite(current)
        best, best_loss = select(better, factors, best), torch.where(better, current, best_loss)
        factors, current = select(broken, best, factors), torch.where(broken, best_loss, current)
    return best


def loss(target: Tensor, factors: Factors) -> Tensor:
    """‖W̃ - A S B̃‖², 0-d."""
    return (target - factors.dense()).square().sum()


class Quadratic(NamedTuple):
    """The loss as a function of S: <S, AᵀA S B̃B̃ᵀ> - 2 <S, C> + constant.

    Attributes:
        a_gram: AᵀA, `[out / bA, bA, bA]`.
        b_gram: B̃B̃ᵀ, `[in / bB, bB, bB]`.
        product: C = AᵀW̃B̃ᵀ, `[out, in]`.
    """

    a_gram: Tensor
    b_gram: Tensor
    product: Tensor

    def apply(self, s: Tensor) -> Tensor:
        """AᵀA S B̃B̃ᵀ, `[out, in]`."""
        return left(self.a_gram, right(s, self.b_gram))


def quadratic(target: Tensor, factors: Factors) -> Quadratic:
    """That of A and B̃ in `factors`."""
    a_transposed, b_transposed = factors.a.transpose(1, 2), factors.b.transpose(1, 2)
    product = left(a_transposed, right(target, b_transposed))
    return Quadratic(a_transposed @ factors.a, factors.b @ b_transposed, product)


def sweep(
    form: Quadratic, factors: Factors, heat: Tensor | None, generator: torch.Generator
) -> Factors:
    """Re-solve every group of S once: all rows and blocks of columns at a time, in b / 4 steps.

    The coupling of rows through AᵀA waits until the end of the sweep. Without heat a block that got
    worse for that keeps its old state (0-13 % of the blocks), so the sweep never raises the loss.

    Args:
        form: that of A and B̃ in `factors`.
        factors: the current state.
        heat: 0-d temperature of the draws; None for a greedy sweep.
        generator: source of the order and of the draws.
    """
    like, count = form.product, form.b_gram.shape[1] // 4
    order = torch.randperm(count, generator=generator, device=like.device)
    uniform = None
    if heat is not None:
        shape = count, len(form.b_gram), len(like)
        uniform = torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
    turn = search.sweep if search.runs(like) else _sweep
    s, mask = turn(*form, factors.s, factors.mask, order, heat, uniform)
    return factors._replace(s=s, mask=mask)


def _sweep(
    a_gram: Tensor,
    b_gram: Tensor,
    product: Tensor,
    s: Tensor,
    mask: Tensor,
    order: Tensor,
    heat: Tensor | None,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S and its mask after a sweep, by torch.

    Args:
        a_gram: as in `Quadratic`, and so the next two.
        b_gram:
        product:
        s: `[out, in]`, zero outside the mask.
        mask: bool `[out, in]`.
        order: of the groups of a block, int64 `[bB / 4]`.
        heat: as in `sweep`.
        uniform: what is drawn at each step, in [0, 1), `[bB / 4, in / bB, out]`.
    """
    form = Quadratic(a_gram, b_gram, product)
    out, blocks, size = len(s), *b_gram.shape[:2]
    error = form.apply(s) - product
    groups = size // 4
    whole = torch.contiguous_format  # copies: both are changed below
    state = s.view(out, blocks, groups, 4).permute(2, 1, 0, 3).clone(memory_format=whole)
    slope = error.view(out, blocks, size).transpose(0, 1).clone(memory_format=whole)
    spread = b_gram.unflatten(1, (groups, 4))  # [in / bB, groups, 4, bB]
    squares = spread.unflatten(-1, (groups, 4)).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
    scale = a_gram.diagonal(dim1=1, dim2=2).reshape(-1)
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    choice = torch.empty(state.shape[:-1], dtype=torch.long, device=state.device)
    for step, group in enumerate(order.tolist()):
        old, square = state[group], squares[group]
        here = slope[..., 4 * group : 4 * group + 4]
        target = scale[:, None] * (old @ square) - here
        values, choice[group] = best_pair(
            target.movedim(-1, 0).contiguous(),
            pair_inverses(square)[..., None],
            scale,
            heat,
            None if uniform is None else uniform[step],
        )
        change = values.movedim(0, -1) - old
        slope.baddbmm_(scale[:, None] * change, spread[:, group])
        state[group] = values.movedim(0, -1)
    new_s = state.permute(2, 1, 0, 3).reshape(out, -1)
    new_mask = pair_mask(choice).permute(2, 1, 0, 3).reshape(out, -1)
    if heat is None:
        worse = _raises(form, error, new_s - s)
        new_s, new_mask = torch.where(worse, s, new_s), torch.where(worse, mask, new_mask)
    return new_s, new_mask


def _raises(form: Quadratic, error: Tensor, change: Tensor) -> Tensor:
    """In which blocks ΔS raises the loss, of which <2 E + AᵀA ΔS B̃B̃ᵀ, ΔS> is the exact change:
    bool `[out, in]`.
    """
    rows, columns = form.a_gram.shape[1], form.b_gram.shape[1]
    rise = (2 * error + form.apply(change)) * change
    worse = rise.view(len(form.a_gram), rows, len(form.b_gram), columns).sum((1, 3)) > 0
    return worse.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def solve_values(form: Quadratic, factors: Factors, steps: int = _VALUE_STEPS) -> Factors:
    """S on its mask by `steps` of Jacobi-preconditioned conjugate gradients, one independent system
    per block (i, j).
    """
    solve = search.solve if search.runs(form.product) else _solve
    return factors._replace(s=solve(*form, factors.s, factors.mask, steps))


def _solve(
    a_gram: Tensor, b_gram: Tensor, product: Tensor, s: Tensor, mask: Tensor, steps: int
) -> Tensor:
    """S by torch, `[out, in]`."""
    form = Quadratic(a_gram, b_gram, product)
    shape = (
        len(form.a_gram),
        form.a_gram.shape[1],
        len(form.b_gram),
        form.b_gram.shape[1],
    )  # a free view: block sums and factors broadcast in it
    diagonal = form.a_gram.diagonal(dim1=1, dim2=2).reshape(-1, 1) * form.b_gram.diagonal(
        dim1=1, dim2=2
    ).reshape(1, -1)
    keep = mask.to(s.dtype)
    inverse = (keep / diagonal.clamp_min(torch.finfo(s.dtype).tiny)).view(shape)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum((1, 3), keepdim=True)

    residual = (form.product - form.apply(s)).view(shape)
    solved = s.view(shape)
    direction = preconditioned = residual * inverse
    power = inner(residual, preconditioned)
    for step in range(steps):
        applied = form.apply(direction.view_as(s)).view(shape)
        length = ratio(power, inner(direction, applied))
        solved = torch.addcmul(solved, length, direction)
        if step + 1 < steps:
            residual = torch.addcmul(residual, length, applied, value=-1)
            preconditioned = residual * inverse
            previous, power = power, inner(residual, preconditioned)
            direction = torch.addcmul(preconditioned, ratio(power, previous), direction)
    return solved.view_as(s)


def solve_a(target: Tensor, factors: Factors) -> Factors:
    """The best A given S and B̃: A_i = W̃_i P_iᵀ (P_i P_iᵀ)⁻¹ with P = S B̃."""
    blocks, size, _ = factors.a.shape
    product = right(factors.s, factors.b).view(blocks, size, -1)
    rhs = product @ target.view(blocks, size, -1).transpose(1, 2)
    solution = proximal_solve(product @ product.transpose(1, 2), rhs, factors.a.transpose(1, 2))
    return factors._replace(a=solution.transpose(1, 2).contiguous())


def solve_b(target: Tensor, factors: Factors) -> Factors:
    """The best B̃ given A and S: B̃_j = (Q_jᵀQ_j)⁻¹ Q_jᵀ W̃_j with Q = A S."""
    blocks, size, _ = factors.b.shape
    product = left(factors.a, factors.s).view(-1, blocks, size).permute(1, 2, 0)
    rhs = product @ target.view(-1, blocks, size).transpose(0, 1)
    return factors._replace(b=proximal_solve(product @ product.transpose(1, 2), rhs, factors.b))

"""ARMOR under a block-diagonal Hessian: min ‖W̃ - A S B̃‖², where W̃_j = W_j L_j and B̃_j = B_j
L_j, H_j = L_j L_jᵀ.

Absorbing the Hessian in B leaves a plain Frobenius fit that separates over the blocks (i, j) given
A and B̃, so every step is a batch of small problems: A and B̃ in closed form, S on its mask by
conjugate gradients with a step length per block, and a sweep over all groups of four in b / 4
steps. The Hessian diagonal of the paper is the case H_j = diag(h_j).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressor.methods.armor_algebra import (
    Factors,
    Gumbels,
    best_pair,
    left,
    pair_inverses,
    pair_mask,
    proximal_solve,
    ratio,
    right,
    temperature,
)


def fit(
    target: Tensor,
    factors: Factors,
    *,
    iterations: int,
    anneal: float,
    generator: torch.Generator,
    thorough: bool,
) -> Factors:
    """Improve `factors` and return the best state seen, never worse than the one given.

    Args:
        target: W̃, `[out, in]`, float32 or float64.
        factors: where to start, b being B̃.
        iterations: sweeps, each followed by solves of S, A and B̃.
        anneal: temperature of the first sweep, in units of the mean loss of a group; 0 makes every
            step monotone.
        generator: source of the noise and of the visiting order, on the device of `target`.
        thorough: two solves of four conjugate-gradient steps after each sweep, where this loss is
            all that counts. Where the whole Hessian comes after it, one solve of one step ends
            lower there, in less than half of the time.
    """
    state = best = State.of(target, factors)
    solves, steps = (2, 4) if thorough else (1, 1)
    noise = Gumbels(6 * target.numel() // factors.b.shape[1], target, generator)
    for step in range(iterations):
        heat = temperature(step, iterations, anneal)
        scale = heat * state.loss * (4 / target.numel()) if heat > 0 else None
        moved, form = sweep(state, scale, noise, generator)
        moved = solve_b(target, solve_a(target, solve_values(form, moved, steps)))
        state = State.of(target, moved)
        for _ in range(solves - 1):
            moved = solve_values(quadratic(state), moved, steps)
            state = State.of(target, solve_b(target, solve_a(target, moved)))
        if bool(state.loss < best.loss):
            best = state
        elif not bool(torch.isfinite(state.loss)):
            state = best
    return best.factors


class State(NamedTuple):
    """Factors and what they miss.

    Attributes:
        factors: A, S and B̃.
        missing: W̃ - A S B̃, `[out, in]`.
        loss: its squared norm, 0-d.
    """

    factors: Factors
    missing: Tensor
    loss: Tensor

    @classmethod
    def of(cls, target: Tensor, factors: Factors) -> State:
        """The state of `factors`."""
        missing = target - factors.dense()
        return cls(factors, missing, missing.square().sum())


class Quadratic(NamedTuple):
    """The loss as a function of S, near the S it is taken at: AᵀA `[out / bA, bA, bA]`, B̃B̃ᵀ
    `[in / bB, bB, bB]` and the half-gradient AᵀA S B̃B̃ᵀ - Aᵀ W̃ B̃ᵀ `[out, in]`.
    """

    a_gram: Tensor
    b_gram: Tensor
    error: Tensor


def quadratic(state: State) -> Quadratic:
    """The quadratic of S at a state."""
    factors = state.factors
    a_transposed, b_transposed = factors.a.transpose(1, 2), factors.b.transpose(1, 2)
    error = left(a_transposed, right(state.missing, b_transposed)).neg_()
    return Quadratic(a_transposed @ factors.a, factors.b @ b_transposed, error)


def _to_rows(x: Tensor, factors: Factors) -> Tensor:
    """`[out, in]` -> `[bA, in / bB, out / bA, bB]`: a copy, with a row of every block first."""
    blocks, size, _ = factors.a.shape
    rows = x.view(blocks, size, len(factors.b), -1).permute(1, 2, 0, 3)
    return rows.clone(memory_format=torch.contiguous_format)


def _from_rows(x: Tensor) -> Tensor:
    """The inverse of `_to_rows`."""
    return x.permute(2, 0, 1, 3).reshape(x.shape[2] * x.shape[0], -1)


def sweep(
    state: State, heat: Tensor | None, noise: Gumbels, generator: torch.Generator
) -> tuple[Factors, Quadratic]:
    """Re-solve every group of S once: all rows at a time, each row at another column group, b / 4
    steps in all.

    The coupling of rows through AᵀA waits until the end of the sweep. Without noise a block that
    got worse for that keeps its old state (0-13 % of the blocks), so the sweep never raises the
    loss.

    Args:
        state: the current one.
        heat: 0-d scale of the noise added to the gains; None for a greedy sweep.
        noise: where the noise comes from.
        generator: source of the order.

    Returns:
        The new factors, and the quadratic there.
    """
    factors, form = state.factors, quadratic(state)
    a_gram, b_gram, start = form
    size, count = a_gram.shape[1], b_gram.shape[1] // 4
    scale = a_gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(start.dtype).tiny)
    error = _to_rows(start / scale.view(-1, 1), factors)  # of each row, over its entry of AᵀA
    s = _to_rows(factors.s, factors).unflatten(-1, (count, 4))
    loud = None if heat is None else heat / scale.T[:, None]  # [bA, 1, out / bA]
    flat, groups_of_error = error.flatten(0, 1), error.unflatten(-1, (count, 4))
    spread = b_gram.unflatten(1, (count, 4))  # [in / bB, groups, 4, bB]
    squares = spread.unflatten(-1, (count, 4)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    inverses = pair_inverses(squares)
    rows = torch.arange(size, device=s.device)
    order = torch.randperm(count, generator=generator, device=s.device)
    turns = order[
        (rows[:, None] + torch.arange(count, device=s.device)) % count
    ]  # [bA, steps]: which group each row is at
    choice = torch.empty(s.shape[:-1], dtype=torch.long, device=s.device)
    for groups in turns.T:
        old = s[rows, :, :, groups]  # [bA, in / bB, out / bA, 4]
        wanted = old @ squares[:, groups].transpose(0, 1) - groups_of_error[rows, :, :, groups]
        inverse = inverses[..., groups].transpose(-1, -2).unsqueeze(-1)  # [3, 6, bA, in / bB, 1]
        extra = None if loud is None else noise.read((6, *wanted.shape[:-1])) * loud
        new, best = best_pair(wanted.movedim(-1, 0).contiguous(), inverse, extra)
        new = new.movedim(0, -1)
        s[rows, :, :, groups], choice[rows, :, :, groups] = new, best
        flat.baddbmm_(
            (new - old).flatten(0, 1),
            spread[:, groups].transpose(0, 1).flatten(0, 1),
        )
    new_s = _from_rows(s.flatten(-2))
    new_mask = _from_rows(pair_mask(choice).flatten(-2))
    return _settled(form, factors, new_s, new_mask, keep_better=heat is None)


def _settled(
    form: Quadratic, factors: Factors, s: Tensor, mask: Tensor, *, keep_better: bool
) -> tuple[Factors, Quadratic]:
    """The new S and the quadratic there; with `keep_better` the old S in blocks (i, j) whose exact
    change of loss, <2 E + AᵀA ΔS B̃B̃ᵀ, ΔS>, is positive.
    """
    a_gram, b_gram, start = form
    change = s - factors.s
    turned = left(a_gram, right(change, b_gram))
    if keep_better:
        rise = ((2 * start + turned) * change).view(len(a_gram), a_gram.shape[1], len(b_gram), -1)
        worse = (
            (rise.sum((1, 3)) > 0)
            .repeat_interleave(a_gram.shape[1], 0)
            .repeat_interleave(b_gram.shape[1], 1)
        )
        s, mask = torch.where(worse, factors.s, s), torch.where(worse, factors.mask, mask)
        turned.masked_fill_(worse, 0)
    return factors._replace(s=s, mask=mask), form._replace(error=turned.add_(start))


def solve_values(form: Quadratic, factors: Factors, steps: int) -> Factors:
    """S on its mask: Jacobi-preconditioned conjugate gradients, one independent system per block
    (i, j); `form` is the quadratic at `factors`.
    """
    a_gram, b_gram, error = form
    shape = (len(a_gram), a_gram.shape[1], len(b_gram), b_gram.shape[1])  # a free view
    diagonal = a_gram.diagonal(dim1=1, dim2=2).reshape(-1, 1) * b_gram.diagonal(
        dim1=1, dim2=2
    ).reshape(1, -1)
    inverse = (factors.mask / diagonal.clamp_min_(torch.finfo(error.dtype).tiny)).view(shape)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum((1, 3), keepdim=True)

    s, residual = factors.s.view(shape), -error.view(shape)
    direction = preconditioned = residual * inverse
    power = inner(residual, preconditioned)
    for step in range(steps):
        applied = left(a_gram, right(direction.view_as(error), b_gram)).view(shape)
        length = ratio(power, inner(direction, applied))
        s = torch.addcmul(s, length, direction)
        if step + 1 < steps:
            residual = torch.addcmul(residual, length, applied, value=-1)
            preconditioned = residual * inverse
            previous, power = power, inner(residual, preconditioned)
            direction = torch.addcmul(preconditioned, ratio(power, previous), direction)
    return factors._replace(s=s.view_as(error))


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

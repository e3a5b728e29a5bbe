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

from typing import NamedTuple

import torch
from torch import Tensor

from compressor.methods.armor_algebra import (
    Factors,
    best_pair,
    diagonal_blocks,
    gumbel,
    left,
    pair_inverses,
    pair_mask,
    proximal_solve,
    ratio,
    right,
    temperature,
)

_PANEL = 128  # columns swept before their effect on all other columns is applied in one product
_ROW_TURNS = (
    1  # rows of a block of A take a group in so many turns; 8 end 0.5 % lower, for twice the time
)
_MOMENTUM = 0.6  # of the way that a round went, it goes on by so much before the next
_FIRST_PUSH = 3  # rounds before that: the first ones go another way than the rest


def fit(
    weight: Tensor,
    gram: Tensor,
    factors: Factors,
    *,
    rounds: int,
    anneal: float,
    generator: torch.Generator,
    wrappers: bool = True,
    cg_steps: int = 4,
    b_steps: int = 4,
) -> Factors:
    """Improve `factors` and return the best state seen, never worse than the one given.

    Args:
        weight: W, `[out, in]`, float32 or float64.
        gram: H, `[in, in]`, symmetric positive definite.
        factors: where to start.
        rounds: rounds of sweep, values, A, B.
        anneal: temperature of the first sweep, in units of the mean loss of a group; 0 makes every
            step monotone but for the momentum, whose failures are taken back.
        generator: source of the noise and of the visiting order, on the device of `weight`.
        wrappers: False leaves A and B as they are.
        cg_steps: conjugate-gradient steps for the values of S in a round.
        b_steps: conjugate-gradient steps for B in a round.
    """
    weight_gram = weight @ gram
    state = best = State.of(weight, gram, factors)
    push = _MOMENTUM
    for step in range(rounds):
        heat = temperature(step, rounds, anneal)
        noise = heat * state.loss * (4 / weight.numel()) if heat > 0 else None
        moved, form = sweep(quadratic(gram, state), state.factors, noise, generator)
        moved = solve_values(form, moved, cg_steps)
        if wrappers:
            moved = solve_b(weight_gram, gram, solve_a(weight_gram, gram, moved), b_steps)
        before, state = best, State.of(weight, gram, moved)
        if bool(state.loss < best.loss):
            best = state
            if wrappers and not anneal and _FIRST_PUSH <= step + 1 < rounds:
                state = State.of(weight, gram, ahead(before.factors, moved, push))
        elif not anneal or not bool(torch.isfinite(state.loss)):
            state, push = best, push / 2
    return best.factors


class State(NamedTuple):
    """Factors and what they miss.

    Attributes:
        factors: A, S and B.
        missing: D H, D = W - A S B, `[out, in]`.
        loss: tr(D H Dᵀ), 0-d.
    """

    factors: Factors
    missing: Tensor
    loss: Tensor

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, factors: Factors) -> State:
        """The state of `factors`."""
        difference = weight - factors.dense()
        missing = difference @ gram
        return cls(factors, missing, (missing * difference).sum())


def ahead(before: Factors, now: Factors, push: float) -> Factors:
    """`now`, moved on by `push` times the way that it has come from `before`; a value of S only
    where the mask is the same.
    """
    return Factors(
        now.a + push * (now.a - before.a),
        torch.where(now.mask == before.mask, now.s + push * (now.s - before.s), now.s),
        now.mask,
        now.b + push * (now.b - before.b),
    )


class Quadratic(NamedTuple):
    """The loss as a function of S, near the S it is taken at.

    Attributes:
        a_gram: AᵀA, `[out / bA, bA, bA]`.
        b_gram: G = B H Bᵀ, `[in, in]`.
        error: the half-gradient AᵀA S G - Aᵀ W H Bᵀ, `[out, in]`.
    """

    a_gram: Tensor
    b_gram: Tensor
    error: Tensor


def quadratic(gram: Tensor, state: State) -> Quadratic:
    """The quadratic of S at a state, whose half-gradient is -Aᵀ D H Bᵀ."""
    factors = state.factors
    a_transposed, b_transposed = factors.a.transpose(1, 2), factors.b.transpose(1, 2)
    error = left(a_transposed, right(state.missing, b_transposed)).neg_()
    return Quadratic(a_transposed @ factors.a, rotated_gram(gram, factors.b), error)


def rotated_gram(gram: Tensor, b: Tensor) -> Tensor:
    """B H Bᵀ, `[in, in]`, exactly symmetric."""
    rotated = right(left(b, gram), b.transpose(1, 2))
    return (rotated + rotated.T) / 2


def sweep(
    form: Quadratic, factors: Factors, noise: Tensor | None, generator: torch.Generator
) -> tuple[Factors, Quadratic]:
    """Re-solve every group of S once, in random order of columns.

    Without noise a block row of A that got worse (possible only where rows share a turn) keeps its
    old state.

    Args:
        form: the quadratic at `factors`.
        factors: the current state.
        noise: 0-d scale of the Gumbel noise added to the gains; None for a greedy sweep.
        generator: source of the order and of the noise.

    Returns:
        The new state, and the quadratic there.
    """
    a_gram, b_gram, start = form
    blocks, size, _ = a_gram.shape
    columns = start.shape[1]
    error, s, mask = start.clone(), factors.s.clone(), factors.mask.clone()
    groups = torch.randperm(columns // 4, generator=generator, device=start.device)
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
            noise,
            generator,
        )
        change = values.view(-1, len(index)) - s[:, index]
        error.addmm_(left(a_gram, change), b_gram[index])
        s[:, index] = values.view(-1, len(index))
        mask[:, index] = pair_mask(choice).view(-1, len(index))
    if noise is None:
        worse = ((start + error) * (s - factors.s)).view(blocks, -1).sum(1) > 0
        worse = worse.repeat_interleave(size)[:, None]
        s, mask = torch.where(worse, factors.s, s), torch.where(worse, factors.mask, mask)
        error = torch.where(worse, start, error)
    return factors._replace(s=s, mask=mask), form._replace(error=error)


def _sweep_panel(
    a_gram: Tensor,
    b_gram: Tensor,
    inverses: Tensor,
    error: Tensor,
    s: Tensor,
    noise: Tensor | None,
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
        noise: as in `sweep`.
        generator: source of the noise.
    """
    blocks, size, columns = s.shape
    turns = min(size, _ROW_TURNS)
    scale = a_gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(s.dtype).tiny)
    choice = torch.empty(blocks, size, columns // 4, dtype=torch.long, device=s.device)
    random = (
        None
        if noise is None
        else noise / scale * gumbel((columns // 4, 6, blocks, size), s, generator)
    )
    for group in range(columns // 4):
        here = slice(4 * group, 4 * group + 4)
        square, local, old = b_gram[here, here], error[..., here].clone(), s[..., here].clone()
        for turn in range(turns):
            rows = slice(turn, None, turns)
            target = s[:, rows, here] @ square - local[:, rows] / scale[:, rows, None]
            extra = None if random is None else random[group, :, :, rows]
            values, choice[:, rows, group] = best_pair(
                target.movedim(-1, 0).contiguous(), inverses[:, :, group, None, None], extra
            )
            values = values.movedim(0, -1)
            local += a_gram[:, :, rows] @ ((values - s[:, rows, here]) @ square)
            s[:, rows, here] = values
        change = s[..., here] - old
        error += (a_gram @ change) @ b_gram[here]
    return s, choice


def solve_values(form: Quadratic, factors: Factors, steps: int) -> Factors:
    """S on its mask by Jacobi-preconditioned conjugate gradients, one independent system per block
    row of A; `form` is the quadratic at `factors`.
    """
    a_gram, b_gram, error = form
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

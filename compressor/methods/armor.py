"""ARMOR: a 2:4 core between block-diagonal wrappers, W ≈ A S B (Liu et al. 2025,
https://arxiv.org/abs/2510.05528).

The wrappers cost bA / in + bB / out of the dense weights and let every group of four choose in a
rotated basis. The paper minimises Σ (W̄ - Ŵ̄)²_ij h_j on the normalised weight with 20,000 steps of
Adam, re-solving one group per block a step. Here each factor is solved exactly in turn and every
group is re-solved in every sweep, drawn at a temperature that falls to nothing; where the Gram
matrix is at hand the output error tr((W - Ŵ) XᵀX (W - Ŵ)ᵀ) itself is minimised instead. The
optimisers are in armor_separable.py and armor_full.py, their common algebra in armor_algebra.py;
docs/armor.md has the numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.errors import NumericalError, UsageError
from compressor.formats.armor import Armor
from compressor.formats.sparse24 import Sparse24
from compressor.methods import armor_full, armor_separable, nowag
from compressor.methods.armor_algebra import Factors, balance, diagonal_blocks, eye_blocks, right
from compressor.pattern import Pattern
from compressor.stats import InputStats

NEEDS_INPUTS = True
NEEDS_GRAM = True
REFINABLE = False
PROXIES = ("diagonal", "block", "full")
_WIDE_RANGE = (
    1e5  # max h / median h above which float32 Gram matrices lose the quiet channels: then float64
)
_ROUNDED_STEPS = 8  # conjugate-gradient steps for the core once the wrappers are rounded


class _Objective(NamedTuple):
    """tr(D H Dᵀ) with D = (W - Ŵ) / rows / columns; `gram` is H `[in, in]`, or its diagonal `[in]`,
    divided by the tokens.
    """

    target: Tensor
    gram: Tensor
    rows: Tensor
    columns: Tensor

    def loss(self, compressed: Tensor) -> float:
        difference = self.target - compressed.to(self.target.dtype) / self.rows / self.columns
        applied = difference * self.gram if self.gram.dim() == 1 else difference @ self.gram
        return (applied * difference).sum(dtype=torch.float64).item()

    def relative_loss(self, compressed: Tensor) -> float:
        """1 for an all-zero weight."""
        return self.loss(compressed) / max(self.loss(torch.zeros_like(compressed)), 1e-300)


def compress(
    weight: Tensor,
    stats: InputStats,
    pattern: Pattern,
    *,
    iterations: int = 100,
    block_size: int = 128,
    overhead: float = 0.125,
    proxy: str = "diagonal",
    anneal: float = 2.0,
    finish: int = 10,
    damp: float = 1e-3,
    seed: int = 0,
) -> Armor | Sparse24:
    """Factorise `weight` `[out, in]`; the result, in the weight's dtype, is never worse than
    NoWag-P in the objective.

    Args:
        weight: `[out, in]`.
        stats: statistics of its inputs, with the Gram matrix unless proxy="diagonal" and finish=0.
        pattern: 2:4.
        iterations: sweeps over all groups under the proxy.
        block_size: largest block of A and B; the largest that divides the dimension and fits
            `overhead` is taken.
        overhead: bound on the size of A and B together, as a fraction of the dense weights. A
            linear for which not even blocks of four fit is stored as plain 2:4.
        proxy: what the sweeps see of the output error: the "diagonal" of the Gram matrix, its
            "block"s, or the "full" matrix. "diagonal" with finish=0 is the paper's loss, on the
            normalised weight.
        anneal: temperature of the first sweep, in units of the mean loss of a group; 0 is greedy
            and monotone.
        finish: greedy rounds under the full Gram matrix afterwards.
        damp: added to the diagonal of the Gram matrix, as a fraction of itself.
        seed: of the draws and of the order of the sweeps.

    Returns:
        Armor; Sparse24 where wrappers do not pay or nothing better than NoWag-P was found. It
        carries the relative losses of NoWag-P and its own, and a note why it is plain 2:4 where it
        is.

    Raises:
        UsageError: an option out of range, a pattern that is not 2:4, or statistics without the
            Gram matrix.
        NumericalError: weights or statistics that are not finite.
    """
    _check(weight, stats, pattern, iterations, block_size, overhead, proxy, anneal, finish, damp)
    baseline = Sparse24.from_dense(nowag.compress(weight, stats, pattern).weight)
    h = stats.norm.double().square() / stats.tokens
    if not bool((weight != 0).any()) or not bool((h > 0).any()):
        return replace(baseline, note="plain 2:4: the weight or its inputs are zero")
    objective = _objective(weight, stats, h, proxy, finish)
    blocks = block_sizes(weight.shape[0], weight.shape[1], block_size, overhead)
    generator = torch.Generator(weight.device).manual_seed(seed)
    start = _start(objective, pattern.mask(nowag.score(weight, stats)), blocks or (1, 4))
    if blocks is None:
        form = _plain(objective, start, weight.dtype, iterations + finish, anneal, damp, generator)
    else:
        factors = _factorise(objective, start, iterations, proxy, anneal, finish, damp, generator)
        form = _store(objective, factors, weight.dtype, damp)
    before, after = objective.relative_loss(baseline.dense()), objective.relative_loss(form.dense())
    if (
        not after <= before
        # and not `after > before`: a loss that is not a number, from an overflow in float16, must
        # lose too
    ):
        return replace(
            baseline,
            losses=(before, before),
            note="plain 2:4: nothing better than NoWag-P was found",
        )
    why = (
        ""
        if blocks
        else f"plain 2:4: no blocks of A and B that divide {list(weight.shape)} "
        f"fit overhead {overhead:g}"
    )
    return replace(form, losses=(before, after), note=why)


def block_sizes(
    rows: int, columns: int, block_size: int, overhead: float
) -> tuple[int, int] | None:
    """Blocks of A and B for a linear `[rows, columns]`, or None where not even blocks of four fit
    `overhead`.

    Blocks are multiples of four, of 16 from 16 on (what tensor cores multiply). Of all pairs that
    fit, the one with the largest product is taken, and of equal ones the larger sum: a 128 -> 352
    linear keeps an error of 0.0085 with (4, 32), 0.0109 with (8, 16).
    """
    fits = [
        (a, b)
        for a in _divisors(rows, block_size)
        for b in _divisors(columns, block_size)
        if a * rows + b * columns <= overhead * rows * columns
    ]
    return max(fits, key=lambda pair: (pair[0] * pair[1], sum(pair), pair), default=None)


def _divisors(features: int, limit: int) -> list[int]:
    return [
        size
        for size in range(4, min(features, limit) + 1, 4)
        if features % size == 0 and (size < 16 or size % 16 == 0)
    ]


def _check(
    weight: Tensor,
    stats: InputStats,
    pattern: Pattern,
    iterations: int,
    block_size: int,
    overhead: float,
    proxy: str,
    anneal: float,
    finish: int,
    damp: float,
) -> None:
    if (pattern.n, pattern.m) != (2, 4):
        raise UsageError(f"armor stores a 2:4 core, not {pattern}; for other patterns use nowag")
    if proxy not in PROXIES:
        raise UsageError(f"proxy {proxy!r} is not known; accepted: {', '.join(PROXIES)}")
    if iterations < 0 or finish < 0 or block_size < 4 or overhead < 0 or anneal < 0 or damp < 0:
        raise UsageError(
            f"armor needs iterations, finish, anneal, damp, overhead >= 0 and block_size >= 4: "
            f"iterations={iterations}, "
            f"finish={finish}, anneal={anneal:g}, damp={damp:g}, overhead={overhead:g}, "
            f"block_size={block_size}"
        )
    if stats.gram is None and (proxy != "diagonal" or finish):
        raise UsageError(
            f"proxy={proxy} with finish={finish} needs the Gram matrix of the inputs; "
            f"proxy=diagonal with finish=0 does not"
        )
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("the weight has NaN or Inf entries")
    if not bool(torch.isfinite(stats.norm).all()) or not stats.tokens:
        raise NumericalError(
            "the statistics of the inputs are not finite (NaN or Inf activations), or no token was "
            "seen"
        )
    if stats.gram is not None and not bool(torch.isfinite(stats.gram).all()):
        raise NumericalError(
            "the Gram matrix of the inputs is not finite (activations too large for float32 sums)"
        )


def _objective(weight: Tensor, stats: InputStats, h: Tensor, proxy: str, finish: int) -> _Objective:
    """The loss that decides: the paper's where only diagonals are used, the output error
    otherwise.
    """
    wide = bool(h.max() > _WIDE_RANGE * h[h > 0].median())
    target = weight.to(torch.float64 if wide else torch.float32)
    if proxy == "diagonal" and not finish:
        rows, columns = nowag.norms(target)
        # a dead channel counts as the quietest live one: its weights are free, but B has to be
        # finite there
        return _Objective(
            target / rows / columns,
            torch.where(h > 0, h, h[h > 0].min()).to(target.dtype),
            rows,
            columns,
        )
    assert stats.gram is not None
    return _Objective(
        target,
        stats.gram.to(target.dtype) / stats.tokens,
        target.new_ones(1, 1),
        target.new_ones(1),
    )


def _start(objective: _Objective, mask: Tensor, blocks: tuple[int, int]) -> Factors:
    """A = I, S = the masked target, B = I."""
    target = objective.target
    a, b = (
        eye_blocks(target.shape[0], blocks[0], target),
        eye_blocks(target.shape[1], blocks[1], target),
    )
    return Factors(a, target * mask, mask, b)


def _damped(gram: Tensor, damp: float) -> Tensor:
    """The Gram matrix with its own diagonal raised: relative to the mean, one loud channel would
    drown all others.
    """
    h = gram.diagonal()
    quietest = torch.where(h > 0, h, torch.inf).min()
    return gram + torch.diag(damp * torch.maximum(h, quietest))


def _factorise(
    objective: _Objective,
    factors: Factors,
    iterations: int,
    proxy: str,
    anneal: float,
    finish: int,
    damp: float,
    generator: torch.Generator,
) -> Factors:
    """`iterations` under the proxy, then `finish` greedy rounds under the full Gram matrix."""
    target, gram = objective.target, objective.gram
    if proxy == "full":
        factors = armor_full.fit(
            target,
            _damped(gram, damp),
            factors,
            rounds=iterations,
            anneal=anneal,
            generator=generator,
        )
    else:
        root = _root(gram, factors.b.shape[1], damp, diagonal=proxy == "diagonal")
        absorbed = factors._replace(b=factors.b @ root)
        absorbed = armor_separable.fit(
            right(target, root), absorbed, iterations=iterations, anneal=anneal, generator=generator
        )
        factors = absorbed._replace(
            b=torch.linalg.solve_triangular(root, absorbed.b, upper=False, left=False)
        )
    if finish:
        factors = armor_full.fit(
            target, _damped(gram, damp), factors, rounds=finish, anneal=0, generator=generator
        )
    return factors


def _root(gram: Tensor, size: int, damp: float, *, diagonal: bool) -> Tensor:
    """Lower L_j with L_j L_jᵀ = H_j, `[in / size, size, size]`; H is only its diagonal where that
    is asked for or all there is.
    """
    if diagonal:
        h = gram if gram.dim() == 1 else gram.diagonal() + damp * gram.diagonal().mean()
        return torch.diag_embed(h.sqrt().view(-1, size))
    blocks = diagonal_blocks(_damped(gram, damp), size)
    factor, failed = torch.linalg.cholesky_ex(blocks)
    # a block that is indefinite by rounding: its diagonal alone is still a proxy, and the finish
    # sees the whole matrix
    fallback = torch.diag_embed(
        blocks.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    )
    return torch.where((failed > 0)[:, None, None], fallback, factor)


def _plain(
    objective: _Objective,
    start: Factors,
    dtype: torch.dtype,
    rounds: int,
    anneal: float,
    damp: float,
    generator: torch.Generator,
) -> Sparse24:
    """The best 2:4 weight without wrappers, or NoWag-P's where there is no Gram matrix to improve
    it with.
    """
    factors = start
    if objective.gram.dim() == 2:
        gram = _damped(objective.gram, damp)
        factors = armor_full.fit(
            objective.target,
            gram,
            start,
            rounds=rounds,
            anneal=anneal,
            generator=generator,
            wrappers=False,
        )
    return Sparse24.from_dense((factors.s * objective.rows * objective.columns).to(dtype))


def _store(objective: _Objective, factors: Factors, dtype: torch.dtype, damp: float) -> Armor:
    """Fold the normaliser into the wrappers, round them, and solve S once more for the rounded
    ones.
    """
    a = factors.a * objective.rows.expand(len(objective.target), 1).reshape(len(factors.a), -1, 1)
    b = factors.b * objective.columns.expand(objective.target.shape[1]).reshape(
        len(factors.b), 1, -1
    )
    factors = balance(factors._replace(a=a, b=b))
    a, b = factors.a.to(dtype), factors.b.to(dtype)
    if objective.gram.dim() == 2 and dtype.itemsize < 4:
        gram = _damped(objective.gram, damp)
        rounded = factors._replace(a=a.to(gram.dtype), b=b.to(gram.dtype))
        factors = armor_full.solve_values(objective.target @ gram, gram, rounded, _ROUNDED_STEPS)
    # as they are read back: what a product rounds to depends on the strides
    return Armor.from_factors(a.contiguous(), factors.s.to(dtype), b.contiguous())

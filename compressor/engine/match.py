"""Matched targets: a linear aims at the outputs of the dense model, not at those of its own weight.

Layer-wise compression aims at XWᵀ, the dense weight on the inputs X of the model compressed so far.
The dense model itself gives X'Wᵀ, on its own inputs X'. The weight that comes closest to *that*
from X is (damped towards W)

    W* = W + strength · W Cᵀ (G + λI)⁻¹,   G = XᵀX,  C = Xᵀ(X' - X),  λ = 0.01 · mean(diag G)

and for every Ŵ (strength 1, no damping)

    ‖X'Wᵀ - XŴᵀ‖² = ‖X(W* - Ŵ)ᵀ‖² + constant:

compressing W* in place of W therefore corrects what was lost before, with the same Gram matrix and
no other change. The same asymmetric objective is used for quantisation by Li et al., GPTAQ,
https://arxiv.org/abs/2504.02692, and Zhang et al., Qronos, https://arxiv.org/abs/2505.11695.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from compressor.engine.one_linear import compress_weight
from compressor.engine.plan import Plan
from compressor.engine.task import Task
from compressor.errors import NumericalError, UsageError, about
from compressor.formats import Form, notes
from compressor.refine.quadratic import Quadratic
from compressor.stats import InputStats

AUTO = "auto"
_TRIED = (0.0, 0.25, 0.5, 0.75)
_DAMPING = 0.01


def strengths(text: str) -> tuple[float, ...]:
    """What the setting `match` says: no strength, the one for all linears, or those that each
    linear may choose from. Raises UsageError.
    """
    if text == AUTO:
        return _TRIED
    try:
        strength = float(text or 0)
    except ValueError:
        strength = -1
    if not 0 <= strength <= 1:
        raise UsageError(f"`match` is {text!r}; accepted: a strength from 0 to 1, or {AUTO}")
    return (strength,) if strength else ()


def correction(weight: Tensor, stats: InputStats, damping: float = _DAMPING) -> Tensor:
    """W Cᵀ (G + λI)⁻¹, float32 `[out, in]`: what strength 1 adds to `weight` `[out, in]`.

    Args:
        weight: dense, any float dtype.
        stats: of the inputs X of the model compressed so far, with `gram` and `cross`.
        damping: λ in units of the mean of the diagonal of G.

    Raises:
        NumericalError: the damped Gram matrix cannot be factored.
    """
    assert stats.gram is not None
    assert stats.cross is not None
    if not bool(stats.norm.any()):
        return torch.zeros_like(weight, dtype=torch.float32)
    damped = Quadratic(stats, damping).block(0, len(stats.gram))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(
            "the Gram matrix cannot be factored to match the dense model: give more calibration "
            "samples, or leave out `match`"
        )
    return torch.cholesky_solve(stats.cross @ weight.float().T, factor).T


def matched(weight: Tensor, shift: Tensor, strength: float) -> Tensor:
    """W* in the dtype of `weight` `[out, in]`; `shift` is its `correction`."""
    return torch.add(weight.float(), shift, alpha=strength).to(weight.dtype)


def compress_matched(plan: Plan, task: Task, weight: Tensor, stats: InputStats) -> Form:
    """What method and refinement make of W*, of the strength that brings its outputs nearest to
    those of the dense model on samples that are held out.
    """
    with about(task.linear.name):
        shift = correction(weight, stats)
    if len(plan.strengths) == 1:
        return compress_weight(plan, task, matched(weight, shift, *plan.strengths), stats)
    best, least = None, float("inf")
    for strength in plan.strengths:
        form = compress_weight(plan, task, matched(weight, shift, strength), stats)
        error = missed(weight, form.dense(), stats)
        if best is None or error < least:
            best, least = _noted(form, f"matched with strength {strength:g}"), error
    assert best
    return best


def _noted(form: Form, text: str) -> Form:
    """The form with `text` in its note, if it carries notes."""
    said = filter(None, [notes(form).get("note"), text])
    return replace(cast(Any, form), note="; ".join(said)) if hasattr(form, "note") else form


def missed(weight: Tensor, compressed: Tensor, stats: InputStats) -> float:
    """‖X'Wᵀ - XŴᵀ‖² on the samples that are held out; weights `[out, in]`."""
    assert stats.held_out is not None
    assert stats.held_out_dense is not None
    wanted = stats.held_out_dense.float() @ weight.float().T
    return (wanted - stats.held_out.float() @ compressed.float().T).square().sum().item()

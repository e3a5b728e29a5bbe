"""What allocators share: linears in groups of one sparsity each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from compressor.allocation.sparsity.apportion import evenly
from compressor.engine.plan import Plan
from compressor.errors import UsageError
from compressor.model.linear import Linear

Groups = Mapping[str, Sequence[Linear]]


def groups(plan: Plan, granularity: str) -> dict[str, list[Linear]]:
    """The linears to prune: those of a `block` together, or each `linear` by itself."""
    if granularity == "linear":
        return {task.linear.name: [task.linear] for task in plan.every}
    named = {
        f"{plan.skeleton.path}.{index}": [task.linear for task in tasks]
        for index, tasks in enumerate(plan.tasks)
    }
    return {name: linears for name, linears in named.items() if linears}


def inside(grouped: Groups, counts: Sequence[int]) -> dict[str, int]:
    """Zeros of every linear, by name, from those of the groups: the same sparsity inside a
    group.
    """
    zeros = {}
    for linears, count in zip(grouped.values(), counts, strict=True):
        zeros |= dict(
            zip(
                [linear.name for linear in linears],
                evenly(count, [linear.size for linear in linears]),
                strict=True,
            )
        )
    return zeros


def ceiling(asked: float, zeros: int, weights: int, default: float) -> Fraction:
    """The largest sparsity of a group: what was asked for, or, if that is 0, the default, at most
    1.

    Raises:
        UsageError: it is below the sparsity of the whole.
    """
    most = Fraction(asked or min(default, 1.0)).limit_denominator(10**6)
    if most * weights < zeros:
        raise UsageError(
            f"max_sparsity {float(most):g} is below the sparsity asked for, {zeros / weights:.4g}"
        )
    return most

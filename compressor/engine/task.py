"""What a run will do with one linear."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from compressor.formats.pivot import numbers
from compressor.methods import counterpart, factors, method_module
from compressor.model.linear import Linear
from compressor.pattern import Pattern


class Rank(int):
    """Of the weight: the number of columns of U and rows of V in W = U V."""


Target = Pattern | Rank
"""What a weight is to become: sparse, or a product of two thin factors."""


@dataclass(frozen=True)
class Task:
    """`method.compress(weight, stats, target, **options)`, refined or not by the refinement of the
    plan.

    Attributes:
        linear: whose weight is compressed.
        method, options: of `compressor.methods`, and its keyword-only arguments.
        target: the pattern or the rank; None until a run has chosen it.
        refined: whether the refinement of the plan is for this linear.
    """

    linear: Linear
    method: ModuleType
    options: dict[str, Any]
    target: Target | None
    refined: bool = True

    @property
    def chosen(self) -> Target:
        """The target of a task that has one."""
        assert self.target is not None, f"no target was chosen for {self.linear.name}"
        return self.target

    @property
    def removed(self) -> float:
        """Fraction of the weight's numbers that go: zeros of a pattern, or what a rank does
        without.
        """
        target = self.chosen
        if isinstance(target, Pattern):
            return float(target.sparsity)
        return 1 - numbers(target, self.linear.shape) / self.linear.size

    @property
    def fits_2_4(self) -> bool:
        """Whether the pruned weight could be stored packed."""
        return isinstance(self.target, Pattern) and self.target.fits_2_4

    @property
    def needs_gradients(self) -> bool:
        """Whether the linear is factored in a backward pass."""
        return factors(self.method) and self.method.NEEDS_GRADIENTS

    def with_target(self, target: Target) -> Task:
        """The task with this target, and with a method that can meet it."""
        ranked = isinstance(target, Rank)
        if factors(self.method) == ranked:
            return replace(self, target=target)
        other = method_module(counterpart(self.method.__name__.rpartition(".")[2]))
        return replace(self, target=target, method=other, options={}, refined=not ranked)

"""A plain weight, zeros in place: the form every tool reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """`weight` `[out, in]`, any dtype."""

    FORMAT: ClassVar[str] = "dense"
    weight: Tensor
    note: str = field(default="", compare=False)
    losses: tuple[float, float] | None = field(default=None, compare=False)

    @property
    def entry(self) -> dict[str, Any]:
        return {"format": self.FORMAT}

    @property
    def sparsity(self) -> float:
        return 1 - int(self.weight.count_nonzero()) / self.weight.numel()

    def dense(self) -> Tensor:
        return self.weight

    def pack(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def factors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    @staticmethod
    def product(weight: Tensor) -> Tensor:
        return weight

    @classmethod
    def from_factors(cls, weight: Tensor) -> Self:
        return cls(weight)

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(tensors["weight"])

"""A weight as the product of two thin factors: W = U V, `rank · (out + in)` numbers in place of
`out · in`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """`u` `[out, rank]` and `v` `[rank, in]`, one dtype. A layer computes y = U (V x)."""

    FORMAT: ClassVar[str] = "lowrank"
    u: Tensor
    v: Tensor
    note: str = field(default="", compare=False)

    @property
    def entry(self) -> dict[str, Any]:
        return {"format": self.FORMAT, "rank": self.v.shape[0]}

    @property
    def sparsity(self) -> float:
        """No zeros: a factored weight is smaller because there are fewer numbers."""
        return 0.0

    def dense(self) -> Tensor:
        """U V, `[out, in]`, multiplied in float32 (or wider) and rounded once."""
        u, v = (factor if factor.itemsize >= 4 else factor.float() for factor in (self.u, self.v))
        return (u @ v).to(self.u.dtype)

    def factors(self) -> dict[str, Tensor]:
        return {"u": self.u, "v": self.v}

    @staticmethod
    def product(u: Tensor, v: Tensor) -> Tensor:
        return u @ v

    @classmethod
    def from_factors(cls, u: Tensor, v: Tensor) -> Self:
        return cls(u, v)

    def pack(self) -> dict[str, Tensor]:
        return {"weight_u": self.u, "weight_v": self.v}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        """The form stored as `tensors`. Raises ValueError where shapes or dtypes do not belong
        together.
        """
        u, v = tensors["weight_u"], tensors["weight_v"]
        if u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0] or not len(v):
            raise ValueError(
                f"weight_u {tuple(u.shape)} and weight_v {tuple(v.shape)} are no pair of factors"
            )
        if u.dtype != v.dtype or not u.is_floating_point():
            raise ValueError(
                f"weight_u is {u.dtype}, weight_v {v.dtype}: one floating dtype is expected"
            )
        return cls(u, v)

"""A plain weight, zeros in place: the form every tool reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """`weight` `[out, in]`, any dtype."""

    FORMAT: ClassVar[str] = "dense"
    weight: Tensor

    def dense(self) -> Tensor:
        return self.weight

    def pack(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(tensors["weight"])

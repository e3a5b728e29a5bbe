"""A 2:4 weight as values and 2-bit metadata: 0.5625 of the bytes of dense bf16. Layout:
compressor_kernels.packing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from compressor_kernels.packing import check24, pack24, unpack24


@dataclass(frozen=True)
class Sparse24:
    """`values` `[out, in / 2]` and int16 `metadata` `[out, ceil(in / 16)]`."""

    FORMAT: ClassVar[str] = "sparse24"
    values: Tensor
    metadata: Tensor
    note: str = field(default="", compare=False)
    losses: tuple[float, float] | None = field(default=None, compare=False)

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        """Pack `weight` `[out, in]`. Raises ValueError where a group has more than two
        non-zeros.
        """
        return cls(*pack24(weight))

    @property
    def entry(self) -> dict[str, Any]:
        return {"format": self.FORMAT}

    @property
    def sparsity(self) -> float:
        return 1 - int(self.values.count_nonzero()) / (2 * self.values.numel())

    def dense(self) -> Tensor:
        return unpack24(self.values, self.metadata)

    def factors(self) -> dict[str, Tensor]:
        return {"weight": self.dense()}

    @staticmethod
    def product(weight: Tensor) -> Tensor:
        return weight

    @classmethod
    def from_factors(cls, weight: Tensor) -> Self:
        return cls.from_dense(weight)

    def pack(self) -> dict[str, Tensor]:
        return {"weight_values": self.values, "weight_metadata": self.metadata}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        check24(tensors["weight_values"], tensors["weight_metadata"])
        return cls(tensors["weight_values"], tensors["weight_metadata"])

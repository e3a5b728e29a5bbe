"""A 2:4 core between two block-diagonal wrappers: W = A S B, stored as packed core and two stacks
of square blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compressor_kernels.packing import check24, pack24, unpack24


@dataclass(frozen=True)
class Armor:
    """`values` `[out, in / 2]` and int16 `metadata` `[out, ceil(in / 16)]` of S, `a` `[out / bA,
    bA, bA]`, `b` `[in / bB, bB, bB]`.

    All floating tensors share one dtype. A layer computes y = A (S (B x)).
    """

    FORMAT: ClassVar[str] = "armor"
    values: Tensor
    metadata: Tensor
    a: Tensor
    b: Tensor
    note: str = field(default="", compare=False)
    losses: tuple[float, float] | None = field(default=None, compare=False)

    @classmethod
    def from_factors(cls, a: Tensor, core: Tensor, b: Tensor) -> Self:
        """Pack the core `[out, in]`. Raises ValueError where a group has more than two
        non-zeros.
        """
        return cls(*pack24(core), a, b)

    def core(self) -> Tensor:
        """S, `[out, in]`."""
        return unpack24(self.values, self.metadata)

    @property
    def entry(self) -> dict[str, Any]:
        return {"format": self.FORMAT, "block_a": self.a.shape[1], "block_b": self.b.shape[1]}

    @property
    def sparsity(self) -> float:
        return 1 - int(self.values.count_nonzero()) / (2 * self.values.numel())

    def dense(self) -> Tensor:
        """A S B, `[out, in]`, multiplied in float32 (or wider) and rounded once."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        return self.product(
            **{name: factor.to(wide) for name, factor in self.factors().items()}
        ).to(self.values.dtype)

    def factors(self) -> dict[str, Tensor]:
        return {"a": self.a, "core": self.core(), "b": self.b}

    @staticmethod
    def product(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
        half = core.view(-1, len(b), b.shape[1]).transpose(0, 1) @ b
        return (a @ half.transpose(0, 1).reshape(len(a), a.shape[1], -1)).view(core.shape)

    def pack(self) -> dict[str, Tensor]:
        """The four stored tensors, by suffix."""
        return {
            "weight_values": self.values,
            "weight_metadata": self.metadata,
            "weight_a": self.a,
            "weight_b": self.b,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        """The form stored as `tensors`. Raises ValueError where shapes, dtypes or metadata do not
        belong together.
        """
        values, metadata, a, b = (
            tensors[f"weight_{part}"] for part in ("values", "metadata", "a", "b")
        )
        check24(values, metadata)
        for name, blocks, size in (
            ("weight_a", a, len(values)),
            ("weight_b", b, 2 * values.shape[1]),
        ):
            if (
                blocks.dim() != 3
                or blocks.shape[1] != blocks.shape[2]
                or blocks.shape[0] * blocks.shape[1] != size
            ):
                raise ValueError(
                    f"{name} {tuple(blocks.shape)} is not a stack of square blocks along {size} "
                    f"features"
                )
            if blocks.dtype != values.dtype:
                raise ValueError(f"{name} is {blocks.dtype}, weight_values are {values.dtype}")
        return cls(values, metadata, a, b)

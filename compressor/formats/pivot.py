"""A weight of rank r by r of its own rows: W[pivots] = V, every other row a combination of them,
W[rest] = C V. That is `r · (out + in - r)` numbers where two thin factors take `r · (out + in)`,
the same product, and fewer than `out · in` at every r below both (Zhao et al. 2025,
https://arxiv.org/abs/2501.19090).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compressor.formats.form import Form, Shape, Spec, matrix
from compressor.formats.lowrank import LowRank, check_rank, told_ranks

if TYPE_CHECKING:
    from torch import Tensor, nn


def numbers(rank: int, shape: Shape) -> int:
    """How many numbers V and C have."""
    return rank * (sum(shape) - rank)


@dataclass(frozen=True)
class Pivot(Form):
    """`v` `[rank, in]` and `c` `[out - rank, rank]`, one dtype, and `pivots` int32 `[rank]`,
    ascending: the rows that are those of V. C has the others, in their order. A layer computes t =
    V x, y[pivots] = t, y[rest] = C t.
    """

    FORMAT: ClassVar[str] = "pivot"
    SUFFIXES: ClassVar[tuple[str, ...]] = ("weight_v", "weight_c", "weight_pivots")
    SPARSE: ClassVar[bool] = False
    TRAINABLE: ClassVar[tuple[str, ...]] = ("weight_v", "weight_c")
    v: Tensor
    c: Tensor
    pivots: Tensor
    note: str = field(default="", compare=False)

    @staticmethod
    def dense_shape(stored: Mapping[str, Spec]) -> Shape:
        rank, columns = matrix(stored, "weight_v")
        return rank + matrix(stored, "weight_c")[0], columns

    @staticmethod
    def stored_specs(entry: Mapping[str, Any], dense: Spec) -> dict[str, Spec]:
        (rows, columns), rank = dense.shape, entry["rank"]
        return {
            "weight_v": Spec(dense.dtype, (rank, columns)),
            "weight_c": Spec(dense.dtype, (rows - rank, rank)),
            "weight_pivots": Spec("I32", (rank,)),
        }

    @classmethod
    def check_entry(cls, entry: Mapping[str, Any], shape: Shape) -> None:
        check_rank(entry, shape)

    @classmethod
    def parameters(cls, entry: Mapping[str, Any], shape: Shape) -> int:
        return numbers(entry["rank"], shape)

    @classmethod
    def label(cls, entry: Mapping[str, Any]) -> str:
        return f"{cls.FORMAT} {entry['rank']}"

    @staticmethod
    def told(rows: Sequence[Mapping[str, Any]]) -> str:
        return told_ranks(rows, Pivot)

    @classmethod
    def module(
        cls, entry: Mapping[str, Any], in_features: int, out_features: int, **common: Any
    ) -> nn.Module:
        from compressor_kernels.pivot_linear import PivotLinear

        return PivotLinear(in_features, out_features, rank=entry["rank"], **common)

    @classmethod
    def example(cls, weight: Tensor) -> Self:
        """Of half the weights, pivots spread evenly."""
        import torch

        n, k = weight.shape
        rank = max(1, round((n + k - (n * n + k * k) ** 0.5) / 2) // 16 * 16)
        generator = torch.Generator(weight.device).manual_seed(0)
        return cls(
            weight.new_empty(rank, k).normal_(std=k**-0.5, generator=generator),
            weight.new_empty(n - rank, rank).normal_(std=rank**-0.5, generator=generator),
            (torch.arange(rank, device=weight.device) * n // rank).int(),
        )

    @property
    def entry(self) -> dict[str, Any]:
        return {"format": self.FORMAT, "rank": len(self.v)}

    @property
    def sparsity(self) -> float:
        return 0.0

    def dense(self) -> Tensor:
        """`[out, in]`: C V multiplied in float32 (or wider) and rounded once."""
        v, c = (part if part.itemsize >= 4 else part.float() for part in (self.v, self.c))
        return self.product(v, c, self.pivots).to(self.v.dtype)

    @classmethod
    def unpack(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Raises ValueError where shapes, dtypes or pivots do not belong together."""
        import torch

        from compressor_kernels.pivot import check_pivots

        v, c, pivots = (tensors[suffix] for suffix in cls.SUFFIXES)
        if v.dim() != 2 or c.dim() != 2 or c.shape[1] != len(v) or pivots.shape != v.shape[:1]:
            raise ValueError(
                f"weight_v {tuple(v.shape)}, weight_c {tuple(c.shape)} and weight_pivots "
                f"{tuple(pivots.shape)} are not of one rank"
            )
        if v.dtype != c.dtype or not v.is_floating_point() or pivots.dtype != torch.int32:
            raise ValueError(
                f"weight_v is {v.dtype}, weight_c {c.dtype}, weight_pivots {pivots.dtype}: one "
                f"floating dtype and int32 are expected"
            )
        check_pivots(pivots, len(v) + len(c))
        return cls(v, c, pivots)

    def thin(self) -> LowRank:
        """The same product as two thin factors: row by row, U picks a row of V or has one of C."""
        import torch

        unit = torch.eye(len(self.v), dtype=self.c.dtype, device=self.c.device)
        return LowRank(self.product(unit, self.c, self.pivots), self.v, self.note)

    def factors(self) -> dict[str, Tensor]:
        return {"v": self.v, "c": self.c, "pivots": self.pivots}

    @staticmethod
    def product(v: Tensor, c: Tensor, pivots: Tensor) -> Tensor:
        from compressor_kernels.pivot import dense, row_order

        return dense(v, c, row_order(pivots, len(v) + len(c)))

    @classmethod
    def from_factors(cls, v: Tensor, c: Tensor, pivots: Tensor) -> Self:
        return cls(v, c, pivots.int())

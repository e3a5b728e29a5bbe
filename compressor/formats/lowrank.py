"""A weight as the product of two thin factors: W = U V, `rank · (out + in)` numbers in place of
`out · in`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compressor.formats.form import Form, Shape, Spec, matrix, weights

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_rank(entry: Mapping[str, Any], shape: Shape) -> None:
    """`Form.check_entry` of a form whose entry has a rank."""
    rank = entry.get("rank")
    if type(rank) is not int or not 0 < rank <= min(shape):
        raise ValueError(f"the rank {str(rank)[:50]}, its weight is {list(shape)}")


def told_ranks(rows: Sequence[Mapping[str, Any]], form: type[Form]) -> str:
    """`Form.told` of such a form."""
    ranks = sorted(row["entry"]["rank"] for row in rows)
    span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    kept = sum(form.parameters(row["entry"], row["shape"]) for row in rows)
    return f"of low rank ({span}, {kept / weights(rows):.1%} of their parameters)"


@dataclass(frozen=True)
class LowRank(Form):
    """`u` `[out, rank]` and `v` `[rank, in]`, one dtype. A layer computes y = U (V x)."""

    FORMAT: ClassVar[str] = "lowrank"
    SUFFIXES: ClassVar[tuple[str, ...]] = ("weight_u", "weight_v")
    SPARSE: ClassVar[bool] = False
    TRAINABLE: ClassVar[tuple[str, ...]] = SUFFIXES
    u: Tensor
    v: Tensor
    note: str = field(default="", compare=False)

    @staticmethod
    def dense_shape(stored: Mapping[str, Spec]) -> Shape:
        return matrix(stored, "weight_u")[0], matrix(stored, "weight_v")[1]

    @staticmethod
    def stored_specs(entry: Mapping[str, Any], dense: Spec) -> dict[str, Spec]:
        (rows, columns), rank = dense.shape, entry["rank"]
        return {
            "weight_u": Spec(dense.dtype, (rows, rank)),
            "weight_v": Spec(dense.dtype, (rank, columns)),
        }

    @classmethod
    def check_entry(cls, entry: Mapping[str, Any], shape: Shape) -> None:
        check_rank(entry, shape)

    @classmethod
    def parameters(cls, entry: Mapping[str, Any], shape: Shape) -> int:
        return entry["rank"] * sum(shape)

    @classmethod
    def label(cls, entry: Mapping[str, Any]) -> str:
        return f"{cls.FORMAT} {entry['rank']}"

    @staticmethod
    def told(rows: Sequence[Mapping[str, Any]]) -> str:
        return told_ranks(rows, LowRank)

    @classmethod
    def module(
        cls, entry: Mapping[str, Any], in_features: int, out_features: int, **common: Any
    ) -> nn.Module:
        from compressor_kernels.linear import LowRankLinear

        return LowRankLinear(in_features, out_features, rank=entry["rank"], **common)

    @classmethod
    def example(cls, weight: Tensor) -> Self:
        """Of half the weights."""
        import torch

        n, k = weight.shape
        rank = max(16, n * k // (2 * (n + k)) // 16 * 16)
        generator = torch.Generator(weight.device).manual_seed(0)
        return cls(
            weight.new_empty(n, rank).normal_(std=rank**-0.5, generator=generator),
            weight.new_empty(rank, k).normal_(std=k**-0.5, generator=generator),
        )

    @property
    def entry(self) -> dict[str, Any]:
        return {"format": self.FORMAT, "rank": self.v.shape[0]}

    @property
    def sparsity(self) -> float:
        return 0.0

    def dense(self) -> Tensor:
        """U V, `[out, in]`, multiplied in float32 (or wider) and rounded once."""
        u, v = (factor if factor.itemsize >= 4 else factor.float() for factor in (self.u, self.v))
        return (u @ v).to(self.u.dtype)

    @classmethod
    def unpack(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Raises ValueError where shapes or dtypes do not belong together."""
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

    def factors(self) -> dict[str, Tensor]:
        return {"u": self.u, "v": self.v}

    @staticmethod
    def product(u: Tensor, v: Tensor) -> Tensor:
        return u @ v

    @classmethod
    def from_factors(cls, u: Tensor, v: Tensor) -> Self:
        return cls(u, v)

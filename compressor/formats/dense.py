"""A plain weight, zeros in place: the form every tool reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compressor.formats.form import Form, Shape, Spec, matrix, zeros

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Dense(Form):
    """`weight` `[out, in]`, any dtype."""

    FORMAT: ClassVar[str] = "dense"
    SUFFIXES: ClassVar[tuple[str, ...]] = ("weight",)
    weight: Tensor
    note: str = field(default="", compare=False)
    losses: tuple[float, float] | None = field(default=None, compare=False)

    @staticmethod
    def dense_shape(stored: Mapping[str, Spec]) -> Shape:
        return matrix(stored, "weight")

    @staticmethod
    def stored_specs(entry: Mapping[str, Any], dense: Spec) -> dict[str, Spec]:
        return {"weight": dense}

    @staticmethod
    def told(rows: Sequence[Mapping[str, Any]]) -> str:
        return f"dense with zeros in place ({zeros(rows)})"

    @classmethod
    def module(
        cls, entry: Mapping[str, Any], in_features: int, out_features: int, **common: Any
    ) -> nn.Module:
        from torch import nn

        return nn.Linear(in_features, out_features, **common)

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        return cls(weight)

    @property
    def sparsity(self) -> float:
        return 1 - int(self.weight.count_nonzero()) / self.weight.numel()

    def dense(self) -> Tensor:
        return self.weight

    @classmethod
    def unpack(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["weight"])

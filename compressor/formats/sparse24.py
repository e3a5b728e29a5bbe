"""A 2:4 weight as values and 2-bit metadata: 0.5625 of the bytes of dense bf16. Layout:
compressor_kernels.packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compressor.formats.form import Form, Shape, Spec, matrix, zeros

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Sparse24(Form):
    """`values` `[out, in / 2]` and int16 `metadata` `[out, ceil(in / 16)]`."""

    FORMAT: ClassVar[str] = "sparse24"
    SUFFIXES: ClassVar[tuple[str, ...]] = ("weight_values", "weight_metadata")
    values: Tensor
    metadata: Tensor
    note: str = field(default="", compare=False)
    losses: tuple[float, float] | None = field(default=None, compare=False)

    @staticmethod
    def dense_shape(stored: Mapping[str, Spec]) -> Shape:
        rows, half = matrix(stored, "weight_values")
        return rows, 2 * half

    @staticmethod
    def stored_specs(entry: Mapping[str, Any], dense: Spec) -> dict[str, Spec]:
        rows, columns = dense.shape
        return {
            "weight_values": Spec(dense.dtype, (rows, columns // 2)),
            "weight_metadata": Spec("I16", (rows, -(-columns // 16))),
        }

    @staticmethod
    def told(rows: Sequence[Mapping[str, Any]]) -> str:
        return f"packed 2:4 ({zeros(rows)})"

    @classmethod
    def module(
        cls, entry: Mapping[str, Any], in_features: int, out_features: int, **common: Any
    ) -> nn.Module:
        from compressor_kernels.linear import Sparse24Linear

        return Sparse24Linear(in_features, out_features, **common)

    @classmethod
    def example(cls, weight: Tensor) -> Self:
        return cls.from_dense(weight)

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        """Pack `weight` `[out, in]`. Raises ValueError where a group has more than two
        non-zeros.
        """
        from compressor_kernels.packing import pack24

        return cls(*pack24(weight))

    @property
    def sparsity(self) -> float:
        return 1 - int(self.values.count_nonzero()) / (2 * self.values.numel())

    def dense(self) -> Tensor:
        from compressor_kernels.packing import unpack24

        return unpack24(self.values, self.metadata)

    @classmethod
    def unpack(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        from compressor_kernels.packing import check24

        check24(tensors["weight_values"], tensors["weight_metadata"])
        return cls(tensors["weight_values"], tensors["weight_metadata"])

    def check_canonical(self) -> None:
        check_canonical24(self.values, self.metadata)


def check_canonical24(values: Tensor, metadata: Tensor) -> None:
    """Raise ValueError unless packing what is unpacked gives the same: docs/format.md, 4 and 5."""
    from torch import equal

    from compressor_kernels.packing import pack24, unpack24

    again = pack24(unpack24(values, metadata))
    if not equal(again[1], metadata) or not equal(again[0], values):
        raise ValueError(
            "its metadata does not name the columns that the format prescribes for its values"
        )

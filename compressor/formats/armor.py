"""A 2:4 core between two block-diagonal wrappers: W = A S B, stored as packed core and two stacks
of square blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compressor.formats.form import Form, Shape, Spec, zeros
from compressor.formats.sparse24 import Sparse24, check_canonical24

if TYPE_CHECKING:
    from torch import Tensor, nn

_EXAMPLE_BLOCK = 128


@dataclass(frozen=True)
class Armor(Form):
    """`values` `[out, in / 2]` and int16 `metadata` `[out, ceil(in / 16)]` of S, `a` `[out / bA,
    bA, bA]`, `b` `[in / bB, bB, bB]`.

    All floating tensors share one dtype. A layer computes y = A (S (B x)).
    """

    FORMAT: ClassVar[str] = "armor"
    SUFFIXES: ClassVar[tuple[str, ...]] = (*Sparse24.SUFFIXES, "weight_a", "weight_b")
    values: Tensor
    metadata: Tensor
    a: Tensor
    b: Tensor
    note: str = field(default="", compare=False)
    losses: tuple[float, float] | None = field(default=None, compare=False)

    @staticmethod
    def dense_shape(stored: Mapping[str, Spec]) -> Shape:
        return Sparse24.dense_shape(stored)

    @staticmethod
    def stored_specs(entry: Mapping[str, Any], dense: Spec) -> dict[str, Spec]:
        (rows, columns), (a, b) = dense.shape, (entry["block_a"], entry["block_b"])
        return {
            **Sparse24.stored_specs(entry, dense),
            "weight_a": Spec(dense.dtype, (rows // a, a, a)),
            "weight_b": Spec(dense.dtype, (columns // b, b, b)),
        }

    @classmethod
    def check_entry(cls, entry: Mapping[str, Any], shape: Shape) -> None:
        blocks = {key: entry.get(key) for key in ("block_a", "block_b")}
        if not all(
            type(size) is int and size > 0 and features % size == 0
            for size, features in zip(blocks.values(), shape, strict=True)
        ):
            raise ValueError(f"wrappers of {blocks}, which do not divide {list(shape)}")

    @classmethod
    def parameters(cls, entry: Mapping[str, Any], shape: Shape) -> int:
        return math.prod(shape) + shape[0] * entry["block_a"] + shape[1] * entry["block_b"]

    @staticmethod
    def told(rows: Sequence[Mapping[str, Any]]) -> str:
        return f"packed 2:4 between block-diagonal factors ({zeros(rows)} in the 2:4 core)"

    @classmethod
    def module(
        cls, entry: Mapping[str, Any], in_features: int, out_features: int, **common: Any
    ) -> nn.Module:
        from compressor_kernels.linear import ArmorLinear

        blocks = {key: entry[key] for key in ("block_a", "block_b")}
        return ArmorLinear(in_features, out_features, **blocks, **common)

    @classmethod
    def example(cls, weight: Tensor) -> Self | None:
        import torch

        from compressor_kernels.packing import pack24

        if any(features % _EXAMPLE_BLOCK for features in weight.shape):
            return None
        generator = torch.Generator(weight.device).manual_seed(0)
        a, b = (
            weight.new_empty(features // _EXAMPLE_BLOCK, _EXAMPLE_BLOCK, _EXAMPLE_BLOCK).normal_(
                std=_EXAMPLE_BLOCK**-0.5, generator=generator
            )
            for features in weight.shape
        )
        return cls(*pack24(weight), a, b)

    def core(self) -> Tensor:
        """S, `[out, in]`."""
        from compressor_kernels.packing import unpack24

        return unpack24(self.values, self.metadata)

    @property
    def entry(self) -> dict[str, Any]:
        return {"format": self.FORMAT, "block_a": self.a.shape[1], "block_b": self.b.shape[1]}

    @property
    def sparsity(self) -> float:
        return 1 - int(self.values.count_nonzero()) / (2 * self.values.numel())

    def dense(self) -> Tensor:
        """A S B, `[out, in]`, multiplied in float32 (or wider) and rounded once."""
        import torch

        wide = torch.promote_types(self.values.dtype, torch.float32)
        return self.product(
            **{name: factor.to(wide) for name, factor in self.factors().items()}
        ).to(self.values.dtype)

    @classmethod
    def unpack(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Raises ValueError where shapes, dtypes or metadata do not belong together."""
        from compressor_kernels.packing import check24

        values, metadata, a, b = (tensors[suffix] for suffix in cls.SUFFIXES)
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

    def check_canonical(self) -> None:
        check_canonical24(self.values, self.metadata)

    def factors(self) -> dict[str, Tensor]:
        return {"a": self.a, "core": self.core(), "b": self.b}

    @staticmethod
    def product(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
        half = core.view(-1, len(b), b.shape[1]).transpose(0, 1) @ b
        return (a @ half.transpose(0, 1).reshape(len(a), a.shape[1], -1)).view(core.shape)

    @classmethod
    def from_factors(cls, a: Tensor, core: Tensor, b: Tensor) -> Self:
        """Pack the core `[out, in]`. Raises ValueError where a group has more than two
        non-zeros.
        """
        from compressor_kernels.packing import pack24

        return cls(*pack24(core), a, b)

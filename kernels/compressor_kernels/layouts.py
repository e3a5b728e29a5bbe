"""How a packed 2:4 core is held in memory: one class for each way, all with the same methods.

    Stored       values and metadata as they stand in the file
    InFragments  the same bytes in the order in which sparse tensor cores read them (fragments.py)
    InTiles      the same bytes in the order in which the CPU kernels read them (cpu/tiles.py)
    Dense        the decompressed matrix, for plain torch

A layout is its tensors, the size of the core, and what is computed from them. It is made from the
stored form (`prepare`) and gives it back byte for byte (`stored`), so that a checkpoint never
depends on where it was loaded. Weights are checked when a layout is made; a call checks x alone. No
gradient reaches a core: it is frozen in every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from compressor_kernels import backend, reference
from compressor_kernels.armor import armor_op
from compressor_kernels.cpu import ops as cpu_ops
from compressor_kernels.cpu.build import kernels as cpu_kernels
from compressor_kernels.cpu.tiles import ROWS, from_tiles, to_tiles
from compressor_kernels.fragments import Fragments, from_fragments, to_fragments
from compressor_kernels.packing import check24, pack24, unpack24
from compressor_kernels.probe import sparse_tensor_cores
from compressor_kernels.sparse24 import (
    check_input,
    differentiable,
    fragments_op,
    new_semaphore,
    stored_op,
)


class Layout:
    """What all layouts promise; `[out, in]` is the shape of the core.

    Attributes:
        names: what a module calls the tensors, in their order. `semaphore` is no part of the
            weight.
        tensors: the first holds the values; floating-point ones are values, others say where these
            belong.
        out_features: rows of the core.
        in_features: columns of the core.
    """

    names: ClassVar[tuple[str, ...]]
    __slots__ = ("in_features", "out_features", "tensors")

    def __init__(self, out_features: int, in_features: int, *tensors: Any) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.tensors: tuple[Any, ...] = tuple(
            [t.detach() if t is not None and t.requires_grad else t for t in tensors]
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.tensors[0].device

    @classmethod
    def runs_on(cls, values: Tensor) -> bool:
        """Whether a core of this dtype can be held so on this device, with kernels that compute
        from it.
        """
        raise NotImplementedError

    @classmethod
    def usable(cls) -> bool:
        """Whether this process can compute from it; what is compiled is loaded by the question."""
        return True

    @classmethod
    def prepare(cls, values: Tensor, metadata: Tensor) -> Self:
        """The layout of a stored core, on its device.

        Args:
            values: `[out, in / 2]`.
            metadata: int16 `[out, ceil(in / 16)]`.

        Raises:
            ValueError: shapes that do not belong together, or metadata that does not name two
                columns of each group in ascending order.
        """
        raise NotImplementedError

    def stored(self) -> tuple[Tensor, Tensor]:
        """`values` and int16 `metadata` that the layout was made from, byte for byte."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The core, `[out, in]`; on the meta device where the values are."""
        values, metadata = self.stored()
        return unpack24(values, metadata.to(values.device) if values.is_meta else metadata)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = S x + bias: `[..., in]` -> `[..., out]` in the dtype of x. Gradients reach x and the
        bias.

        Raises:
            ValueError: x has not the dtype, the device or the number of features of the core.
        """
        raise NotImplementedError

    def armor(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = A (S (B x)) + bias, as `linear`; a `[out / bA, bA, bA]` and b `[in / bB, bB, bB]` are
        in the dtype of the core.
        """
        inner = reference.block_diagonal(x, b)
        y = reference.block_diagonal(self.linear(inner), a)
        return y if bias is None else y + bias

    def cast(self, dtype: torch.dtype) -> Self:
        """The same core with values of another dtype, as autocast casts a weight."""
        tensors = (t if t is None else cast(t, dtype) for t in self.tensors)
        return type(self)(self.out_features, self.in_features, *tensors)

    @classmethod
    def join(cls, cores: Sequence[Any]) -> tuple[Any, list[Any]] | None:
        """One core of the rows of all `cores`, and each of them as a view of it; None where that
        cannot be.
        """
        return None


class Stored(Layout):
    """Values and metadata as in the file. Kernels for any GPU read them; where none runs each call
    decompresses.

    `prepare` keeps the metadata as bytes, uint8 `[out, 2 ceil(in / 16)]`: neither gloo nor NCCL
    sends int16.
    """

    names = ("weight_values", "weight_metadata", "semaphore")

    @classmethod
    def runs_on(cls, values: Tensor) -> bool:
        return backend.runs(values)

    @classmethod
    def unwritten(
        cls,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Self:
        """Empty tensors for a checkpoint to be loaded into."""
        values = torch.empty(out_features, in_features // 2, dtype=dtype, device=device)
        words = torch.empty(out_features, -(-in_features // 16), dtype=torch.int16, device=device)
        return cls(out_features, in_features, values, words, None)

    @classmethod
    def prepare(cls, values: Tensor, metadata: Tensor) -> Self:
        check24(values, metadata)
        rows, device = len(values), values.device
        semaphore = new_semaphore(rows, device) if backend.runs(values) else None
        positions = metadata.contiguous().view(torch.uint8)
        return cls(rows, 2 * values.shape[1], values.contiguous(), positions, semaphore)

    def stored(self) -> tuple[Tensor, Tensor]:
        values, metadata, _ = self.tensors
        return values, metadata.view(torch.int16)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values, metadata, semaphore = self.tensors
        check_input(x, self.in_features, values)
        if differentiable(x, bias):
            return reference.sparse24(x, values, metadata.view(torch.int16), bias)
        return stored_op(x, values, metadata, bias, semaphore)


class InFragments(Layout):
    """The order in which a warp holds the sparse operand of `mma.sp`; the bytes are those of the
    stored form.
    """

    names = ("weight_fragments", "weight_words", "semaphore")

    @classmethod
    def runs_on(cls, values: Tensor) -> bool:
        return backend.runs(values) and sparse_tensor_cores(values.device)

    @classmethod
    def prepare(cls, values: Tensor, metadata: Tensor) -> Self:
        check24(values, metadata)
        rows = len(values)
        fragments = to_fragments(values, metadata)
        return cls(rows, 2 * values.shape[1], *fragments, new_semaphore(rows, values.device))

    @property
    def fragments(self) -> Fragments:
        """The weight, without the semaphore."""
        return Fragments(*self.tensors[:2])

    def stored(self) -> tuple[Tensor, Tensor]:
        return from_fragments(self.fragments, self.out_features, self.in_features)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values, words, semaphore = self.tensors
        check_input(x, self.in_features, values)
        if differentiable(x, bias):
            return linear(x, self.dense(), bias)
        return fragments_op(x, values, words, self.out_features, bias, semaphore)

    def armor(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        if differentiable(x, bias):
            return super().armor(x, a, b, bias)
        values, words, semaphore = self.tensors
        check_input(x, self.in_features, values)
        return armor_op(x, values, words, a, b, bias, semaphore)

    @classmethod
    def join(cls, cores: Sequence[Any]) -> tuple[Any, list[Any]] | None:
        if any(core.out_features % 16 for core in cores[:-1]):
            return None  # a tile of 16 rows would belong to two
        joined = [torch.cat(same) for same in zip(*(core.fragments for core in cores), strict=True)]
        rows, columns = sum(core.out_features for core in cores), cores[0].in_features
        parts, start = [], 0
        for core in cores:
            end = start + len(core.fragments.words)
            views = (tensor[start:end] for tensor in joined)
            parts.append(cls(core.out_features, columns, *views, core.tensors[2]))
            start = end
        return cls(rows, columns, *joined, new_semaphore(rows, joined[0].device)), parts


class InTiles(Layout):
    """The order in which the kernels for a CPU read a core; the bytes are those of the stored
    form.
    """

    names = ("weight_tiles", "weight_positions")

    @classmethod
    def runs_on(cls, values: Tensor) -> bool:
        on_cpu = values.device.type == "cpu" and values.dtype in cpu_ops.DTYPES
        return on_cpu and values.numel() > 0 and cls.usable()

    @classmethod
    def usable(cls) -> bool:
        return cpu_kernels().problem is None

    @classmethod
    def prepare(cls, values: Tensor, metadata: Tensor) -> Self:
        check24(values, metadata)
        return cls(len(values), 2 * values.shape[1], *to_tiles(values, metadata))

    def stored(self) -> tuple[Tensor, Tensor]:
        values, positions = self.tensors
        return from_tiles(values, positions, self.out_features, self.in_features)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values, positions = self.tensors
        check_input(x, self.in_features, values)
        if differentiable(x, bias) or not self._kernels_read(values):
            return linear(x, self.dense(), bias)
        return cpu_ops.sparse24(x, values, positions, bias, self.out_features, self.in_features)

    def armor(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        values, positions = self.tensors
        if differentiable(x, bias) or not self._kernels_read(values):
            return super().armor(x, a, b, bias)
        check_input(x, self.in_features, values)
        return cpu_ops.armor(x, values, positions, a.contiguous(), b.contiguous(), bias)

    @staticmethod
    def _kernels_read(values: Tensor) -> bool:
        """It was not moved to another device, nor cast to a dtype that the kernels do not know."""
        return values.device.type == "cpu" and values.dtype in cpu_ops.DTYPES

    @classmethod
    def join(cls, cores: Sequence[Any]) -> tuple[Any, list[Any]] | None:
        if any(core.out_features % ROWS for core in cores[:-1]):
            return None  # a tile would belong to two
        joined = [torch.cat(same) for same in zip(*(core.tensors for core in cores), strict=True)]
        parts, start = [], 0
        for core in cores:
            end = start + len(core.tensors[0])
            views = (tensor[start:end] for tensor in joined)
            parts.append(cls(core.out_features, core.in_features, *views))
            start = end
        rows = sum(core.out_features for core in cores)
        return cls(rows, cores[0].in_features, *joined), parts


class Dense(Layout):
    """The decompressed core, multiplied by torch."""

    names = ("weight_core",)

    @classmethod
    def runs_on(cls, values: Tensor) -> bool:
        return True

    @classmethod
    def prepare(cls, values: Tensor, metadata: Tensor) -> Self:
        check24(values, metadata)
        return cls(len(values), 2 * values.shape[1], unpack24(values, metadata))

    def stored(self) -> tuple[Tensor, Tensor]:
        core = self.dense()
        if core.is_meta:
            unwritten = Stored.unwritten(self.out_features, self.in_features, core.dtype, "meta")
            return unwritten.stored()
        return pack24(core)

    def dense(self) -> Tensor:
        return self.tensors[0]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, self.dense(), bias)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products of x in; None where it is off."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts an operand of a product: integers and float64 stay as they are."""
    plain = not tensor.is_floating_point() or tensor.dtype == torch.float64
    return tensor if plain else tensor.to(dtype)


LAYOUTS: tuple[type[Layout], ...] = (
    InFragments,
    Stored,
    InTiles,
)  # that kernels compute from, the fastest first


def kernel_layout(values: Tensor) -> type[Layout] | None:
    """The layout that computes fastest from a core packed, of this dtype and on this device; None
    where no kernel runs.
    """
    return next((layout for layout in LAYOUTS if layout.runs_on(values)), None)

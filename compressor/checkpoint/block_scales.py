"""Weights of eight or four bits with a scale for each of their blocks, as DeepSeek publishes them.

`X.weight` `[.., out, in]` is F8_E4M3, and `X.weight_scale_inv` `[.., ⌈out/128⌉, ⌈in/128⌉]` holds
what the numbers of each block are to be multiplied by, in spite of its name: as F32 or BF16, or as
a power of two in one byte (F8_E8M0, or U8 with the same bits). A weight without blocks has one
scale. DeepSeek V4 has experts of four bits: I8 `[out, in/2]`, two E2M1 numbers a byte, the lower
half first, with a scale for every 32 of a row.

DeepSeek-V3 technical report, section 3.3: https://arxiv.org/abs/2412.19437. No torch at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.header import ITEM_BITS, Entry
from compressor.checkpoint.scales import e2m1_pairs, scale_factors
from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Lazy = Callable[[str], Any]
"""Name on disk -> a slice of safetensors, read by `[...]`, `[index]` or `[start:stop]`."""

SUFFIX = "_scale_inv"
_OTHER_SUFFIXES = (".scale", ".qscale_weight")  # in place of `.weight`: DeepSeek V4, Mistral
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_FP4_BLOCK = (1, 32)
_AT_ONCE = 1 << 22  # numbers in float32 at once


@dataclass(frozen=True)
class BlockScaled:
    """One weight and its scales.

    Attributes:
        name: of the weight on disk, and of the dense one.
        scale: the name of its scales on disk.
        shape: of the dense weight, `[.., out, in]`; with three dimensions an expert each.
        block: rows and columns that share a scale.
        four_bits: two numbers are in a byte.
    """

    name: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    four_bits: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Its tensors on disk; the dense one takes the place of the first."""
        return self.name, self.scale

    @property
    def form(self) -> str:
        """What it is stored as, for people."""
        whole = self.block == self.shape[-2:]
        blocks = "one scale" if whole else f"a scale for {self.block[0]} x {self.block[1]} numbers"
        return f"{'E2M1' if self.four_bits else 'F8_E4M3'} with {blocks}"

    def check(self, lazy: Lazy) -> None:
        """Raise CheckpointError unless every scale is a finite number."""
        scale_factors(lazy(self.scale)[...], self.scale)

    def rows(self, lazy: Lazy, start: int, stop: int) -> Tensor:
        """`[start:stop]` of the dense weight along its first dimension, in bfloat16. Raises
        CheckpointError for a scale that is no number.
        """
        import torch

        stored, scales = lazy(self.name), lazy(self.scale)[...]
        dense = torch.empty(stop - start, *self.shape[1:], dtype=torch.bfloat16)
        if len(self.shape) == 2:
            factors = scale_factors(scales, self.scale).reshape(self._grid)
            self._fill(dense, stored, factors, start)
        else:
            scales = scales.reshape(self.shape[0], *self._grid)
            for expert in range(start, stop):
                factors = scale_factors(scales[expert], self.scale)
                self._fill(dense[expert - start], stored[expert], factors, 0)
        return dense

    @property
    def _grid(self) -> tuple[int, int]:
        """Blocks along the rows and the columns of one matrix."""
        return math.ceil(self.shape[-2] / self.block[0]), math.ceil(self.shape[-1] / self.block[1])

    def _fill(self, dense: Tensor, stored: Any, factors: Tensor, first: int) -> None:
        """Rows of one matrix, some at a time.

        Args:
            dense: `[rows, in]`, to be filled.
            stored: the matrix as it is stored, a tensor or a slice; its rows from `first` on.
            factors: `[⌈out/block⌉, ⌈in/block⌉]`, float32.
            first: row.
        """
        height, width = self.block
        columns = self.shape[-1]
        step = max(1, _AT_ONCE // columns)
        for at in range(0, len(dense), step):
            count = min(step, len(dense) - at)
            row = first + at
            part = stored[row : row + count]
            numbers = e2m1_pairs(part) if self.four_bits else part.float()
            block = row // height
            own = factors[block : (row + count - 1) // height + 1].repeat_interleave(height, 0)
            own = own[row - block * height :][:count].repeat_interleave(width, 1)[:, :columns]
            dense[at : at + count] = numbers.mul_(own)


def find(tensors: Mapping[str, Entry], described: Mapping[str, Any]) -> dict[str, BlockScaled]:
    """The weights with scales among the `tensors` on disk, by name.

    Args:
        tensors: headers.
        described: `quantization_config` of config.json.

    Raises:
        CheckpointError: a weight without its scales, scales without their weight, or a shape or
            dtype that does not go with the other's.
    """
    block = _block(described)
    found: dict[str, BlockScaled] = {}
    for name, entry in tensors.items():
        scale = _scale_of(name, entry, tensors)
        if scale is not None:
            found[name] = _weight(name, entry, scale, tensors[scale], block)
        elif entry.dtype.startswith("F8_E") and entry.dtype != "F8_E8M0":
            raise CheckpointError(
                f"{name} is stored as {entry.dtype}, and its scales are not there: {name}{SUFFIX} "
                f"is expected"
            )
    used = {weight.scale for weight in found.values()}
    for name in tensors:
        if name.endswith(SUFFIX) and name not in used:
            weight = name.removesuffix(SUFFIX)
            stored = (
                f"is stored as {tensors[weight].dtype}" if weight in tensors else "is not there"
            )
            raise CheckpointError(f"{name} holds scales, but {weight} {stored}")
    return found


def dropped(found: Mapping[str, BlockScaled], tensors: Mapping[str, Entry]) -> set[str]:
    """Tensors that only a computation in eight bits needs: the scales of what enters a linear."""
    names = (f"{name.removesuffix('.weight')}.activation_scale" for name in found)
    return {name for name in names if name in tensors}


def _block(described: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block; None where each weight has one scale. Raises CheckpointError."""
    block = described.get("weight_block_size", (128, 128))
    if block is None:
        return None
    whole = isinstance(block, list | tuple) and all(type(n) is int and n > 0 for n in block)
    if not whole or len(block) != 2:
        raise CheckpointError(
            f"config.json: quantization_config.weight_block_size is {str(block)[:100]}; two "
            f"positive numbers or null are expected"
        )
    return block[0], block[1]


def _scale_of(name: str, entry: Entry, tensors: Mapping[str, Entry]) -> str | None:
    """The name of the scales of a stored weight of one byte a number, or half of one; None for any
    other tensor.
    """
    if ITEM_BITS[entry.dtype] != 8 or entry.dtype == "F8_E8M0" or len(entry.shape) < 2:
        return None
    stem = name.removesuffix(".weight")
    others = [f"{stem}{suffix}" for suffix in _OTHER_SUFFIXES if stem != name]
    return next((scale for scale in (f"{name}{SUFFIX}", *others) if scale in tensors), None)


def _weight(
    name: str, entry: Entry, scale: str, scales: Entry, block: tuple[int, int] | None
) -> BlockScaled:
    """A weight and its scales, checked against each other. Raises CheckpointError."""
    four_bits = entry.dtype == "I8"
    if entry.dtype not in ("F8_E4M3", "I8") or len(entry.shape) > 3:
        raise CheckpointError(
            f"{name} ({entry.dtype} {list(entry.shape)}) has scales; matrices of F8_E4M3 or of two "
            f"4-bit numbers in an I8 are expected, or three dimensions for experts"
        )
    if scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale} is stored as {scales.dtype}; scales are {', '.join(_SCALE_DTYPES)}"
        )
    *lead, rows, columns = list(entry.shape)
    columns *= 2 if four_bits else 1
    shape = (*lead, rows, columns)
    if 0 in shape:
        raise CheckpointError(f"{name} has shape {list(entry.shape)} and scales: it is empty")
    height, width = _FP4_BLOCK if four_bits else block or (rows, columns)
    grid = (*lead, math.ceil(rows / height), math.ceil(columns / width))
    one_each = block is None and not four_bits and math.prod(scales.shape) == math.prod(grid)
    if scales.shape != grid and not one_each:
        raise CheckpointError(
            f"{scale} has shape {list(scales.shape)}; {name} {list(entry.shape)} with blocks of "
            f"{height} x {width} has scales of shape {list(grid)}"
        )
    if len(shape) == 3 and rows % height:  # are blocks counted anew where up follows gate?
        raise CheckpointError(
            f"{name} has shape {list(entry.shape)}: where its blocks of {height} rows begin cannot "
            f"be told of experts in one tensor"
        )
    return BlockScaled(name, scale, shape, (height, width), four_bits)

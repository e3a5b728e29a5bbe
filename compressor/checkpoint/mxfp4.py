"""Experts of four bits with a scale for every 32 numbers, all of a block in one tensor, as gpt-oss
is published.

`X_blocks` U8 `[experts, out, groups, 16]` holds two E2M1 numbers a byte, the lower half first, and
`X_scales` U8 `[experts, out, groups]` an E8M0 for each group. The dense tensor is named `X` and is
`[experts, 32 * groups, out]`: its family multiplies from the other side.

No torch at import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.header import Entry
from compressor.checkpoint.scales import e2m1_pairs, scale_factors
from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_AT_ONCE = 1 << 22  # numbers in float32 at once


@dataclass(frozen=True)
class Mxfp4:
    """One tensor of all experts.

    Attributes:
        name: of the dense tensor; no tensor on disk has it.
        shape: of the dense tensor, `[experts, in, out]`.
    """

    name: str
    shape: tuple[int, int, int]
    form = "MXFP4"

    @property
    def parts(self) -> tuple[str, str]:
        """Its tensors on disk; the dense one takes the place of the first."""
        return self.name + _BLOCKS, self.name + _SCALES

    def check(self, lazy: Callable[[str], Any]) -> None:
        """Raise CheckpointError unless every scale is a finite number."""
        scales = lazy(self.parts[1])
        for expert in range(self.shape[0]):
            scale_factors(scales[expert], self.parts[1])

    def rows(self, lazy: Callable[[str], Any], start: int, stop: int) -> Tensor:
        """Experts `[start:stop]` in bfloat16, `[experts, in, out]`. Raises CheckpointError for a
        scale that is no number.
        """
        import torch

        blocks, scales = (lazy(part) for part in self.parts)
        _, columns, rows = self.shape
        dense = torch.empty(stop - start, columns, rows, dtype=torch.bfloat16)
        step = max(1, _AT_ONCE // columns)
        for expert in range(start, stop):
            bytes_of, factors = blocks[expert], scale_factors(scales[expert], self.parts[1])
            for row in range(0, rows, step):
                end = min(row + step, rows)
                numbers = e2m1_pairs(bytes_of[row:end]).mul_(factors[row:end, :, None])
                dense[expert - start, :, row:end] = numbers.flatten(1).T
        return dense


def find(tensors: Mapping[str, Entry]) -> dict[str, Mxfp4]:
    """The MXFP4 tensors among the `tensors` on disk, by the name of the dense one.

    Raises:
        CheckpointError: blocks without scales, scales without blocks, or a shape or dtype that does
            not go with the other's.
    """
    found: dict[str, Mxfp4] = {}
    stems = {
        name.removesuffix(suffix)
        for name, entry in tensors.items()
        for suffix in (_BLOCKS, _SCALES)
        if name.endswith(suffix) and entry.dtype == "U8"
    }
    for name in sorted(stems):
        for part, other in ((_BLOCKS, _SCALES), (_SCALES, _BLOCKS)):
            if name + part not in tensors:
                raise CheckpointError(f"{name + other} is there, and {name + part} is not")
        if name in tensors:
            raise CheckpointError(f"{name} is there twice: as it is, and as {name + _BLOCKS}")
        blocks, scales = tensors[name + _BLOCKS], tensors[name + _SCALES]
        whole = len(blocks.shape) == 4 and blocks.shape[3] == 16 and 0 not in blocks.shape
        if not whole or blocks.dtype != "U8":
            raise CheckpointError(
                f"{name + _BLOCKS} is {blocks.dtype} {list(blocks.shape)}; U8 [experts, out, "
                f"groups, 16] is expected of MXFP4"
            )
        if scales.shape != blocks.shape[:3] or scales.dtype != "U8":
            raise CheckpointError(
                f"{name + _SCALES} is {scales.dtype} {list(scales.shape)}; U8 "
                f"{list(blocks.shape[:3])} goes with {name + _BLOCKS}"
            )
        experts, rows, groups, _ = blocks.shape
        found[name] = Mxfp4(name, (experts, groups * 32, rows))
    return found

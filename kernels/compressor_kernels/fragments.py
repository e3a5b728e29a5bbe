"""The fragment order: a 2:4 weight laid out as `mma.sp` reads it, so that a warp loads 16 bytes a
lane and decodes nothing.

The stored layout (packing.py) is cut into tiles of 16 rows and 64 columns, and each tile is put in
the order in which the 32 lanes of a warp hold it as the sparse operand of two `mma.sp.m16n8k32`
(PTX ISA, "Matrix fragments for sparse mma.m16n8k32"). With lane = 4 · gid + tig, gid = 0..7, tig =
0..3, and step = 0, 1 for the two halves of 32 columns:

    values [tiles, ktiles, step, lane, 8]   four pairs of each lane: (row gid, group tig), (row gid
                                            + 8, group tig), (row gid, group tig + 4), (row gid + 8,
                                            group tig + 4); eight groups a step
    words  [tiles, ktiles, lane]            int32; the four groups of columns 16 tig .. 16 tig + 15
           of the tile:
                                            row gid in the low half, row gid + 8 in the high half

Rows are filled up to a multiple of 16 and columns to a multiple of 64 with zeros. The size is that
of the stored layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_FILLER = 0x4444  # four groups that name columns 0 and 1


class Fragments(NamedTuple):
    """A packed 2:4 weight in fragment order."""

    values: Tensor  # [ceil(out / 16), ceil(in / 64), 2, 32, 8]
    words: Tensor  # int32 [ceil(out / 16), ceil(in / 64), 32]


def to_fragments(values: Tensor, metadata: Tensor) -> Fragments:
    """Stored layout -> fragment order, on the device of `values`.

    Args:
        values: `[out, in / 2]`.
        metadata: int16 `[out, ceil(in / 16)]`.
    """
    rows, half = values.shape
    tiles, ktiles = -(-rows // 16), -(-half // 32)
    values = pad(values, (0, 32 * ktiles - half, 0, 16 * tiles - rows))
    metadata = pad(
        metadata, (0, 4 * ktiles - metadata.shape[1], 0, 16 * tiles - rows), value=_FILLER
    )
    # tile, half of the rows, gid | ktile, step, half of the groups, tig, place in the pair
    pieces = values.reshape(tiles, 2, 8, ktiles, 2, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)
    low, high = metadata.view(tiles, 2, 8, ktiles, 4).permute(1, 0, 3, 2, 4)
    words = (low.int() & 0xFFFF) | high.int() << 16
    return Fragments(pieces.reshape(tiles, ktiles, 2, 32, 8), words.reshape(tiles, ktiles, 32))


def from_fragments(
    fragments: Fragments, out_features: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """Values and metadata as stored; the inverse of `to_fragments`, byte for byte."""
    tiles, ktiles = fragments.words.shape[:2]
    pieces = fragments.values.view(tiles, ktiles, 2, 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)
    values = pieces.reshape(16 * tiles, 32 * ktiles)[:out_features, : in_features // 2].contiguous()
    words = fragments.words.view(tiles, ktiles, 8, 4)
    halves = torch.stack(
        (words << 16 >> 16, words >> 16), 1
    )  # tile, half, ktile, gid, tig; the sign is kept
    metadata = halves.permute(0, 1, 3, 2, 4).reshape(16 * tiles, 4 * ktiles).to(torch.int16)
    return values, metadata[:out_features, : -(-in_features // 16)].contiguous()

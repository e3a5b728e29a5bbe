"""The stored form of a 2:4 weight and its tiles, which the CPU kernels read (tiles.h).

    values     [ceil(out / 8), ceil(in / 32), 8, 16]  the kept weights of 8 rows and 32 columns
    positions  uint8 [ceil(out / 8), ceil(in / 32), 8, 4]  two bits for each of these: its place in
                                                           its group of four, lowest bits first

The bytes are those of the stored form in another order, filled up with zeros to whole tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_FILLER = 0x4444  # four groups that name columns 0 and 1
ROWS = 8
KEPT = 16  # weights of a row in a tile
WORDS = 2  # of 16 bits, the positions of these


def to_tiles(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """Stored form -> tiles.

    Args:
        values: `[out, in / 2]`.
        metadata: int16 `[out, ceil(in / 16)]`.
    """
    rows, half = values.shape
    down, across = -(-rows // ROWS), -(-half // KEPT)
    fill = ROWS * down - rows
    values = pad(values, (0, KEPT * across - half, 0, fill))
    metadata = pad(metadata, (0, WORDS * across - metadata.shape[1], 0, fill), value=_FILLER)
    kept = values.view(down, ROWS, across, KEPT).transpose(1, 2).contiguous()
    words = metadata.view(down, ROWS, across, WORDS).transpose(1, 2).contiguous()
    return kept, words.view(torch.uint8)


def from_tiles(
    values: Tensor, positions: Tensor, out_features: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """Values and metadata as stored; the inverse of `to_tiles`, byte for byte."""
    down, across = values.shape[:2]
    plain = values.transpose(1, 2).reshape(ROWS * down, KEPT * across)
    words = positions.view(torch.int16).transpose(1, 2).reshape(ROWS * down, WORDS * across)
    kept = plain[:out_features, : in_features // 2].contiguous()
    return kept, words[:out_features, : -(-in_features // 16)].contiguous()

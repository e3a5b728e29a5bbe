"""The stored form of a 2:4 weight and its tiles, which the CPU kernels read (tiles.h).

    values     [ceil(out / 4), ceil(in / 64), 4, 32]  the kept weights of 4 rows and 64 columns
    positions  uint8 [ceil(out / 4), ceil(in / 64), 4, 8]  two bits for each of these: its place in
                                                           its group of four, lowest bits first

The bytes are those of the stored form in another order, filled up with zeros to whole tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_FILLER = 0x4444  # four groups that name columns 0 and 1
ROWS = 4


def to_tiles(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """Stored form -> tiles.

    Args:
        values: `[out, in / 2]`.
        metadata: int16 `[out, ceil(in / 16)]`.
    """
    rows, half = values.shape
    down, across = -(-rows // ROWS), -(-half // 32)
    fill = ROWS * down - rows
    values = pad(values, (0, 32 * across - half, 0, fill))
    metadata = pad(metadata, (0, 4 * across - metadata.shape[1], 0, fill), value=_FILLER)
    words = metadata.view(down, ROWS, across, 4).transpose(1, 2).contiguous()
    return values.view(down, ROWS, across, 32).transpose(1, 2).contiguous(), words.view(torch.uint8)


def from_tiles(
    values: Tensor, positions: Tensor, out_features: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """Values and metadata as stored; the inverse of `to_tiles`, byte for byte."""
    down, across = values.shape[:2]
    plain = values.transpose(1, 2).reshape(ROWS * down, 32 * across)
    words = positions.view(torch.int16).transpose(1, 2).reshape(ROWS * down, 4 * across)
    kept = plain[:out_features, : in_features // 2].contiguous()
    return kept, words[:out_features, : -(-in_features // 16)].contiguous()

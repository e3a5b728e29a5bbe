"""The 2:4 layout: its single definition, in plain torch. docs/format.md says why it is so.

A weight `[out, in]` with at most two non-zeros in every aligned group of four along `in` becomes

    values    [out, in / 2]          the weight's dtype; the two kept weights of each group, in
              column order
    metadata  [out, ceil(in / 16)]   int16; bits 4g..4g+3 of a word belong to its g-th group: i0 |
              i1 << 2, i0 < i1

A group with fewer than two non-zeros still names two distinct columns: the unused ones are the
lowest free columns and their values are zero. The packed form is therefore a function of the weight
alone, and packing twice gives the same bytes. A last word that is not full is filled with the pair
(0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22  # weights handled at once, so that temporaries stay small beside a large matrix


def _pair_of_code() -> list[int]:
    """Nibble i0 | i1 << 2 for each 4-bit code of non-zero columns; 0 marks a code with more than
    two.
    """
    nibbles = []
    for code in range(16):
        used = [column for column in range(4) if code >> column & 1]
        free = [column for column in range(4) if not code >> column & 1]
        pair = sorted((used + free)[:2])
        nibbles.append(pair[0] | pair[1] << 2 if len(used) <= 2 else 0)
    return nibbles


_NIBBLE = torch.tensor(_pair_of_code(), dtype=torch.uint8)
_FILLER = 0 | 1 << 2


def pack24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 weight without loss.

    Args:
        weight: `[out, in]`, any dtype, `in` a multiple of four.

    Returns:
        values `[out, in / 2]` in the weight's dtype, metadata int16 `[out, ceil(in / 16)]`.

    Raises:
        ValueError: `in` is not a multiple of four, or a group has more than two non-zeros (row and
            column are named).
    """
    rows, columns = weight.shape
    if columns % 4:
        raise ValueError(f"in_features {columns} is not a multiple of 4")
    values = torch.empty(rows, columns // 2, dtype=weight.dtype, device=weight.device)
    metadata = torch.empty(rows, -(-columns // 16), dtype=torch.int16, device=weight.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values[part], metadata[part] = _pack_rows(weight[part], start)
    return values, metadata


def _pack_rows(weight: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // 4, 4)
    used = (groups != 0).to(torch.uint8)
    code = used[..., 0] | used[..., 1] << 1 | used[..., 2] << 2 | used[..., 3] << 3
    nibble = _NIBBLE.to(weight.device)[code.int()]
    if not bool(nibble.all()):
        row, group = (nibble == 0).nonzero()[0].tolist()
        raise ValueError(
            f"more than two non-zeros in row {first_row + row}, columns "
            f"{4 * group}..{4 * group + 3}"
        )
    pair = torch.stack((nibble & 3, nibble >> 2), dim=-1).long()
    return groups.gather(-1, pair).reshape(rows, columns // 2), _to_words(nibble)


def _to_words(nibble: Tensor) -> Tensor:
    """uint8 `[rows, groups]` -> int16 `[rows, ceil(groups / 4)]`."""
    padded = torch.nn.functional.pad(nibble, (0, -nibble.shape[1] % 4), value=_FILLER)
    pieces = padded.reshape(len(nibble), -1, 2, 2).int()
    low_high = pieces[..., 0] | pieces[..., 1] << 4
    word = low_high[..., 0] | low_high[..., 1] << 8
    return torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16)


def _to_nibbles(metadata: Tensor, groups: int) -> Tensor:
    """int16 `[rows, words]` -> uint8 `[rows, groups]`."""
    shifts = torch.tensor([0, 4, 8, 12], device=metadata.device, dtype=torch.int32)
    nibbles = metadata.int().unsqueeze(-1) >> shifts & 15
    return nibbles.reshape(len(metadata), -1)[:, :groups].to(torch.uint8)


def unpack24(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense weight `[out, in]` of a packed pair; the inverse of `pack24`.

    Raises:
        ValueError: the shapes do not belong together.
    """
    check_shapes(values, metadata)
    rows, half = values.shape
    weight = torch.empty(rows, half * 2, dtype=values.dtype, device=values.device)
    step = max(1, _CHUNK // max(1, 2 * half))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        nibble = _to_nibbles(metadata[part], half // 2)
        pairs = values[part].reshape(len(nibble), half // 2, 2)
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        groups = weight[part].view(len(nibble), half // 2, 4)
        for column in range(4):
            second = torch.where(nibble >> 2 == column, pairs[..., 1], zero)
            groups[..., column] = torch.where(nibble & 3 == column, pairs[..., 0], second)
    return weight


def metadata_of_columns(metadata: Tensor, start: int, stop: int, columns: int) -> Tensor:
    """The metadata of columns `start` to `stop` of a weight with so many `columns`; both are
    multiples of four.

    Whole words are a view. Elsewhere the nibbles are put into words anew; no value is looked at.
    """
    if start % 4 or stop % 4:
        raise ValueError(f"columns {start} to {stop} cut a group of four")
    if start % 16 == 0 and (stop % 16 == 0 or stop == columns):
        return metadata[:, start // 16 : -(-stop // 16)]
    return _to_words(_to_nibbles(metadata, columns // 4)[:, start // 4 : stop // 4])


def check_shapes(values: Tensor, metadata: Tensor) -> None:
    """Raise ValueError unless values `[out, in / 2]` and metadata int16 `[out, ceil(in / 16)]`
    belong together.
    """
    if values.dim() != 2 or values.shape[1] % 2 or not values.is_floating_point():
        raise ValueError(
            f"values are {values.dtype} {tuple(values.shape)}, not a float matrix with an even "
            f"number of columns"
        )
    expected = (len(values), -(-values.shape[1] // 8))
    if metadata.shape != expected or metadata.dtype != torch.int16:
        raise ValueError(
            f"values {tuple(values.shape)} need metadata int16 {expected}, not {metadata.dtype} "
            f"{tuple(metadata.shape)}"
        )


def check24(values: Tensor, metadata: Tensor) -> None:
    """Raise ValueError unless the two belong together and every group names two distinct columns in
    ascending order.
    """
    check_shapes(values, metadata)
    nibble = _to_nibbles(metadata, values.shape[1] // 2)
    bad = (nibble & 3) >= (nibble >> 2)
    if bool(bad.any()):
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"metadata of row {row}, group {group} does not name two columns in ascending order"
        )


def fill_empty_groups(values: Tensor, metadata: Tensor) -> None:
    """Let groups of two zeros that name no two columns name columns 0 and 1, in place; all zeros
    are a weight, too.
    """
    check_shapes(values, metadata)
    nibble = _to_nibbles(metadata, values.shape[1] // 2)
    empty = (values.detach() == 0).view(len(values), -1, 2).all(-1)
    unnamed = ((nibble & 3) >= (nibble >> 2)) & empty
    if bool(unnamed.any()):
        metadata.copy_(_to_words(nibble.masked_fill(unnamed, _FILLER)))

"""Which part of each stored tensor a rank holds where linears are split over several ranks.

A rank holds some rows of a weight `[out, in]` (its outputs) and a span of its columns (its inputs).
Every stored form can be cut so that the product of the cut factors is the cut of the product:

| form | rows | columns |
|---|---|---|
| 2:4 | rows of values and metadata | groups of four; words of metadata, made anew if need be |
| ARMOR | whole blocks of A, their rows of the core | whole blocks of B, their columns of the core |
| low rank | rows of U, V whole | columns of V, U whole |
| low rank by pivots | as U V, the rows of the pivots being unit rows of U | columns of V, C whole |

Where the columns of an ARMOR weight are split, A is whole on every rank: it is applied to the
rank's partial sums, which are added up afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats import form_class
from compressor_kernels.packing import metadata_of_columns


@dataclass(frozen=True)
class Share:
    """What a rank holds of a linear.

    Attributes:
        rows: int64 `[local outputs]`, on the CPU: the rows of the whole weight, in the order in
            which the rank has them.
        start, stop: the span of its columns.
        inputs: how many columns the whole weight has.
        whole: its rows are all rows of the weight, in their order.
    """

    rows: Tensor
    start: int
    stop: int
    inputs: int
    whole: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight on this rank."""
        return len(self.rows), self.stop - self.start


def held_as(entry: Mapping[str, Any], share: Share) -> Mapping[str, Any]:
    """The entry of what a rank holds of a weight stored as `entry` says. Some rows of one that is
    stored by pivots have too few of these to be stored so: they are two thin factors.
    """
    if entry["format"] == "pivot" and not share.whole:
        return {**entry, "format": "lowrank"}
    return entry


def obstacle(entry: Mapping[str, Any], share: Share) -> str:
    """Why a weight stored as `entry` says cannot be cut to `share` in that form; empty where it
    can be.
    """
    form, span = form_class(entry["format"]), f"its columns {share.start} to {share.stop}"
    if strange := [suffix for suffix in form.SUFFIXES if suffix not in _CUTS]:
        return f"a share of {strange[0]} is not known"
    try:
        form.check_entry(entry, share.shape)
    except ValueError as error:
        return f"a rank's part would have {error}"
    if held_as(entry, share) != entry and _no_smaller(entry["rank"], share.shape):
        return "a rank's part would have factors no smaller than it"
    if "weight_values" in form.SUFFIXES and (share.start % 4 or share.stop % 4):
        return f"{span} cut a group of four"
    if "weight_a" in form.SUFFIXES and _blocks(share.rows, entry["block_a"]) is None:
        return f"its rows are not whole blocks of {entry['block_a']}"
    if "weight_b" in form.SUFFIXES and share.start % entry["block_b"]:
        return f"{span} are not whole blocks of {entry['block_b']}"
    return ""


def cut(entry: Mapping[str, Any], suffix: str, tensor: Tensor, share: Share) -> Tensor:
    """The part of a stored tensor that belongs to `share`, a view where it can be one.

    Args:
        entry: of the linear in config.json; `obstacle` is empty for it.
        suffix: which of its tensors, such as `weight_values`.
        tensor: the whole one.
    """
    return _CUTS[suffix](tensor, share, entry)


def _whole_blocks(tensor: Tensor, share: Share, entry: Mapping[str, Any]) -> Tensor:
    blocks = _blocks(share.rows, entry["block_a"])
    assert blocks is not None
    return _pick(tensor, blocks)


def _metadata(tensor: Tensor, share: Share, _: Mapping[str, Any]) -> Tensor:
    rows = _pick(tensor, share.rows)
    return metadata_of_columns(rows, share.start, share.stop, share.inputs)


_CUTS: dict[str, Callable[[Tensor, Share, Mapping[str, Any]], Tensor]] = {
    "weight": lambda t, s, _: _pick(t, s.rows)[:, s.start : s.stop],
    "weight_values": lambda t, s, _: _pick(t, s.rows)[:, s.start // 2 : s.stop // 2],
    "weight_metadata": _metadata,
    "weight_a": _whole_blocks,
    "weight_b": lambda t, s, entry: t[s.start // entry["block_b"] : s.stop // entry["block_b"]],
    "weight_u": lambda t, s, _: _pick(t, s.rows),
    "weight_v": lambda t, s, _: t[:, s.start : s.stop],
    "weight_c": lambda t, s, _: t,
    "weight_pivots": lambda t, s, _: t,
}
"""The part of each stored tensor, by suffix, that belongs to a share of a linear with an entry."""


def _no_smaller(rank: int, shape: tuple[int, int]) -> bool:
    return rank * sum(shape) >= shape[0] * shape[1]


def _blocks(rows: Tensor, size: int) -> Tensor | None:
    """Which blocks of `size` rows `rows` are; None where one is not whole or not in order."""
    if len(rows) % size:
        return None
    grouped = rows.view(-1, size)
    blocks = grouped[:, :1] // size
    whole = torch.equal(grouped, blocks * size + torch.arange(size, device="cpu"))
    return blocks[:, 0] if whole else None


def _pick(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor[index]`, a view where the index is a range."""
    first, stop = int(index[0]), int(index[0]) + len(index)
    together = torch.equal(index, torch.arange(first, stop, device="cpu"))
    return tensor[first:stop] if together else tensor[index]

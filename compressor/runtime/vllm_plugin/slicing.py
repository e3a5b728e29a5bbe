"""Which part of each stored tensor a rank holds where linears are split over several ranks.

A rank holds some rows of a weight `[out, in]` (its outputs) and a span of its columns (its inputs).
Every stored form can be cut so that the product of the cut factors is the cut of the product:

| form | rows | columns |
|---|---|---|
| 2:4 | rows of values and metadata | groups of four; words of metadata, made anew if need be |
| ARMOR | whole blocks of A, their rows of the core | whole blocks of B, their columns of the core |
| low rank | rows of U, V whole | columns of V, U whole |

Where the columns of an ARMOR weight are split, A is whole on every rank: it is applied to the
rank's partial sums, which are added up afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats import Spec, form_class
from compressor_kernels.packing import metadata_of_columns

_CUT = ("dense", "sparse24", "armor", "lowrank")
"""Forms that `cut` knows; another one is unpacked."""


@dataclass(frozen=True)
class Share:
    """What a rank holds of a linear.

    Attributes:
        rows: int64 `[local outputs]`, on the CPU: the rows of the whole weight, in the order in
            which the rank has them.
        start, stop: the span of its columns.
        inputs: how many columns the whole weight has.
    """

    rows: Tensor
    start: int
    stop: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight on this rank."""
        return len(self.rows), self.stop - self.start


def obstacle(entry: Mapping[str, Any], share: Share) -> str:
    """Why a weight stored as `entry` says cannot be cut to `share` in that form; empty where it
    can be.
    """
    form, span = entry["format"], f"its columns {share.start} to {share.stop}"
    if form not in _CUT:
        return f"the form {form} is not cut"
    if form in ("sparse24", "armor") and (share.start % 4 or share.stop % 4):
        return f"{span} cut a group of four"
    if form == "armor":
        size_a, size_b = entry["block_a"], entry["block_b"]
        if _blocks(share.rows, size_a) is None:
            return f"its {len(share.rows)} rows are not whole blocks of {size_a}"
        if share.start % size_b or share.stop % size_b:
            return f"{span} are not whole blocks of {size_b}"
    return ""


def cut(entry: Mapping[str, Any], suffix: str, tensor: Tensor, share: Share) -> Tensor:
    """The part of a stored tensor that belongs to `share`, a view where it can be one.

    Args:
        entry: of the linear in config.json; `obstacle` is empty for it.
        suffix: which of its tensors, such as `weight_values`.
        tensor: the whole one.
    """
    start, stop = share.start, share.stop
    if suffix == "weight_a":
        blocks = _blocks(share.rows, entry["block_a"])
        assert blocks is not None
        return _pick(tensor, blocks)
    if suffix == "weight_b":
        return tensor[start // entry["block_b"] : stop // entry["block_b"]]
    if suffix == "weight_v":
        return tensor[:, start:stop]
    tensor = _pick(tensor, share.rows)
    if suffix == "weight_values":
        return tensor[:, start // 2 : stop // 2]
    if suffix == "weight_metadata":
        return metadata_of_columns(tensor, start, stop, share.inputs)
    return tensor if suffix == "weight_u" else tensor[:, start:stop]


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


def shapes(entry: Mapping[str, Any], rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The stored tensors of a weight `[rows, columns]`, by suffix."""
    specs = form_class(entry["format"]).stored_specs(entry, Spec("BF16", (rows, columns)))
    return {suffix: spec.shape for suffix, spec in specs.items()}

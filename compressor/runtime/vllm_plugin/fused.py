"""The linears of a checkpoint that are one layer of the engine, as far as this rank holds them.

vLLM fuses linears that read the same tensor (q, k and v; gate and up). Here each of them is a part
with its own form. Parts that are neighbours and held alike, as dense weights or as 2:4, share one
segment: one weight, one kernel call. Memory is taken before a tensor is loaded, for what the rank
holds and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.formats import form_class
from compressor.runtime.modules import packed_module
from compressor.runtime.vllm_plugin.slicing import Share, cut, shapes
from compressor_kernels.packing import check24

Entry = Mapping[str, Any]
"""What config.json says of a linear: its format, and what else its shapes take."""

DENSE: Entry = {"format": "dense"}
_PAIR = 0x4444  # a word of metadata in which every group names its columns 0 and 1


@dataclass
class Part:
    """One linear of the checkpoint.

    Attributes:
        name: for messages.
        entry: how it is stored.
        share: what this rank holds of it.
        packed: whether it is held as it is stored; otherwise it is unpacked as soon as all of its
            tensors are there.
        place: this rank's tensors of it, by suffix: views into those of its segment.
        whole: tensors that have come and wait for the others.
        loaded: suffixes of the tensors that have come.
    """

    name: str
    entry: Entry
    share: Share
    packed: bool
    place: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)

    @property
    def held(self) -> Entry:
        """The entry of what is in memory."""
        return self.entry if self.packed else DENSE

    def load(self, suffix: str, tensor: Tensor) -> None:
        """Take one stored tensor, all ranks' of it. Raises CheckpointError where it does not belong
        to this linear or does not fit.
        """
        expected = suffixes(self.entry)
        if suffix not in expected:
            raise CheckpointError(
                f"config.json says that {self.name} is stored as {', '.join(expected)}, the "
                f"checkpoint has its {suffix}"
            )
        if self.packed:
            self._check_shape(suffix, tensor)
            self.place[suffix].copy_(cut(self.entry, suffix, tensor, self.share))
        else:
            self.whole[suffix] = tensor
            if len(self.whole) == len(expected):
                self._unpack()
        self.loaded.add(suffix)

    def _check_shape(self, suffix: str, tensor: Tensor) -> None:
        rows = int(self.share.rows.max()) + 1
        least = shapes(DENSE if suffix == "weight" else self.entry, rows, self.share.inputs)[suffix]
        shape = tuple(tensor.shape)
        any_rows = suffix not in ("weight_b", "weight_v") and len(shape) == len(least)
        fits = shape[1:] == least[1:] and shape[0] >= least[0] if any_rows else shape == least
        if not fits:
            raise CheckpointError(
                f"{self.name}.{suffix} is {shape}, which does not fit the model's linear of "
                f"{self.share.inputs} inputs and at least {rows} outputs"
            )

    def _unpack(self) -> None:
        share, place = self.share, self.place["weight"]
        try:
            weight = dense_weight(self.entry["format"], self.whole, place.dtype)
        except ValueError as error:
            raise CheckpointError(f"{self.name} is damaged: {error}") from None
        self._check_shape("weight", weight)
        place.copy_(cut(DENSE, "weight", weight, share))
        self.whole.clear()

    def check(self) -> None:
        """Raise CheckpointError where a tensor has not come, or metadata is damaged."""
        missing = [suffix for suffix in suffixes(self.entry) if suffix not in self.loaded]
        if missing:
            names = ", ".join(f"{self.name}.{suffix}" for suffix in missing)
            raise CheckpointError(f"the checkpoint lacks {names}: its copy is not complete")
        if "weight_metadata" in self.place:
            try:
                check24(self.place["weight_values"], self.place["weight_metadata"])
            except ValueError as error:
                raise CheckpointError(f"{self.name} is damaged: {error}") from None


@dataclass
class Segment:
    """Parts that are held together: `entry` of all of them, their tensors by suffix, and the
    `[outputs, inputs]` of their weight.
    """

    entry: Entry
    tensors: dict[str, Tensor]
    shape: tuple[int, int]

    def module(self, name: str) -> nn.Module:
        """What computes with it, `[..., in]` -> `[..., out]`; `name` is for messages."""
        rows, columns = self.shape
        dtype = next(tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point())
        module: nn.Module = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
        if self.entry != DENSE:
            module = packed_module(name, module, self.entry)
        module.load_state_dict(self.tensors, assign=True)
        return module.requires_grad_(False)


def suffixes(entry: Entry) -> tuple[str, ...]:
    """What stands in place of `weight` in the names of a linear's stored tensors."""
    return form_class(entry["format"]).SUFFIXES


def dense_weight(form: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` that the stored tensors of a form stand for, in `dtype`. Raises
    ValueError where they are damaged.
    """
    cast = {
        suffix: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for suffix, tensor in tensors.items()
    }
    return form_class(form).unpack(cast).dense()


def allocate(parts: Sequence[Part], dtype: torch.dtype, device: torch.device) -> list[Segment]:
    """The segments that hold `parts`, in their order, filled with zeros; each part is given its
    place.
    """

    def kind(part: Part) -> str:
        form = part.held["format"]
        return form if form in ("dense", "sparse24") else part.name

    segments = []
    for _, group in groupby(parts, key=kind):
        members = list(group)
        shape = sum(part.share.shape[0] for part in members), members[0].share.shape[1]
        tensors = {
            suffix: torch.full(size, _PAIR, dtype=torch.int16, device=device)
            if suffix == "weight_metadata"
            else torch.zeros(size, dtype=dtype, device=device)
            for suffix, size in shapes(members[0].held, *shape).items()
        }
        segments.append(Segment(members[0].held, tensors, shape))
        start = 0
        for part in members if len(members) > 1 else ():
            stop = start + part.share.shape[0]
            part.place = {suffix: tensor[start:stop] for suffix, tensor in tensors.items()}
            start = stop
        if len(members) == 1:
            members[0].place = tensors
    return segments

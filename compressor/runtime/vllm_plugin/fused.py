"""The linears of a checkpoint that are one layer of the engine, as far as this rank holds them.

vLLM fuses linears that read the same tensor (q, k and v; gate and up). Here each of them is a part
with its own form. Parts that are neighbours and held alike, as dense weights or as 2:4, share one
segment: one weight, one kernel call. Memory is taken before a tensor is loaded, for what the rank
holds and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.packed_config import module_entry, place_of
from compressor.errors import CheckpointError
from compressor.formats import Form, Spec, checked_shape, form_class, form_of
from compressor.formats.dense import Dense
from compressor.formats.form import torch_dtype
from compressor.formats.pivot import Pivot
from compressor.runtime.modules import packed_module
from compressor.runtime.vllm_plugin.slicing import Share, cut, held_as
from compressor_kernels.packing import check24
from compressor_kernels.pivot import check_pivots

Entry = Mapping[str, Any]
"""What config.json says of a linear: its format, and what else its shapes take."""

DENSE: Entry = {"format": "dense"}
_OF_ALL_ROWS = ("weight_b", "weight_v", "weight_c", "weight_pivots")
"""Tensors whose first dimension is known; that of the others has rows of other ranks too."""
_PAIR = 0x4444  # a word of metadata in which every group names its columns 0 and 1


@dataclass
class Part:
    """One linear of the checkpoint.

    Attributes:
        name: for messages.
        entry: how it is stored.
        share: what this rank holds of it.
        packed: whether it is held as it is stored, or by `held_as` of slicing.py; otherwise it is
            unpacked. What is held otherwise than stored is made as soon as all of its tensors are
            there.
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
        return held_as(self.entry, self.share) if self.packed else DENSE

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
        if self.held == self.entry:
            self._place(suffix, tensor)
        else:
            self.whole[suffix] = tensor
            if len(self.whole) == len(expected):
                self._convert()
        self.loaded.add(suffix)

    def _place(self, suffix: str, tensor: Tensor) -> None:
        """Keep this rank's part of a tensor of what is held."""
        self._check_shape(suffix, tensor)
        self.place[suffix].copy_(cut(self.held, suffix, tensor, self.share))

    def _check_shape(self, suffix: str, tensor: Tensor) -> None:
        rows = int(self.share.rows.max()) + 1
        _, least = specs(self.held, (rows, self.share.inputs), tensor.dtype)[suffix]
        shape = tuple(tensor.shape)
        any_rows = suffix not in _OF_ALL_ROWS and len(shape) == len(least)
        fits = shape[1:] == least[1:] and shape[0] >= least[0] if any_rows else shape == least
        if not fits:
            raise CheckpointError(
                f"{self.name}.{suffix} is {shape}, which does not fit the model's linear of "
                f"{self.share.inputs} inputs and at least {rows} outputs"
            )

    def _convert(self) -> None:
        dtype = next(tensor.dtype for tensor in self.place.values())
        try:
            form = unpacked(self.entry, self.whole, dtype)
        except ValueError as error:
            raise CheckpointError(f"{self.name} is damaged: {error}") from None
        found = module_entry(form.entry, place_of(self.entry))
        if found != self.entry:
            raise CheckpointError(
                f"config.json says that {self.name} is {dict(self.entry)}, it is {found}"
            )
        held = form.thin() if isinstance(form, Pivot) and self.packed else Dense(form.dense())
        for suffix, tensor in held.pack().items():
            self._place(suffix, tensor)
        self.whole.clear()

    def check(self) -> None:
        """Raise CheckpointError where a tensor has not come, or metadata is damaged."""
        missing = [suffix for suffix in suffixes(self.entry) if suffix not in self.loaded]
        if missing:
            names = ", ".join(f"{self.name}.{suffix}" for suffix in missing)
            raise CheckpointError(f"the checkpoint lacks {names}: its copy is not complete")
        if "weight_metadata" in self.place:
            self._undamaged(check24, self.place["weight_values"], self.place["weight_metadata"])
        if "weight_pivots" in self.place:
            self._undamaged(check_pivots, self.place["weight_pivots"], self.share.shape[0])

    def _undamaged(self, check: Callable[..., None], *stored: Any) -> None:
        try:
            check(*stored)
        except ValueError as error:
            raise CheckpointError(f"{self.name} is damaged: {error}") from None


@dataclass
class Segment:
    """Parts that are held together: `entry` of all of them, their tensors by suffix, and the
    `[outputs, inputs]` and dtype of their weight.
    """

    entry: Entry
    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype

    def module(self, name: str) -> nn.Module:
        """What computes with it, `[..., in]` -> `[..., out]`; `name` is for messages."""
        rows, columns = self.shape
        module: nn.Module = nn.Linear(columns, rows, bias=False, device="meta", dtype=self.dtype)
        if self.entry != DENSE:
            module = packed_module(name, module, self.entry)
        module.load_state_dict(self.tensors, assign=True)
        return module.requires_grad_(False)


def suffixes(entry: Entry) -> tuple[str, ...]:
    """What stands in place of `weight` in the names of a linear's stored tensors. Raises
    CheckpointError for a form that this version does not know.
    """
    return form_class(entry["format"]).SUFFIXES


def specs(
    entry: Entry, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the stored tensors of a weight of that shape and dtype, by suffix."""
    stored = form_class(entry["format"]).stored_specs(entry, Spec("", shape))
    return {
        suffix: (dtype if spec.dtype == "" else torch_dtype(spec.dtype), spec.shape)
        for suffix, spec in stored.items()
    }


def fitting(entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> Entry:
    """The first of these entries of one form that these stored tensors have the shapes of. Raises
    ValueError where there is none.
    """
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}
    for entry in entries:
        try:
            dense = Spec("", checked_shape(entry, tensors))
        except ValueError:
            continue
        due = form_class(entry["format"]).stored_specs(entry, dense)
        if {suffix: spec.shape for suffix, spec in due.items()} == shapes:
            return entry
    raise ValueError(f"its tensors {shapes} are not what config.json says: {entries}")


def unpacked(entry: Entry, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Form:
    """The form of these stored tensors; those in the weight's dtype are cast to `dtype`. Raises
    ValueError where they are damaged.
    """
    own = form_class(entry["format"]).stored_specs(entry, Spec("", checked_shape(entry, tensors)))
    cast = {
        suffix: tensor if own[suffix].dtype else tensor.to(dtype)
        for suffix, tensor in tensors.items()
    }
    return form_of(entry, cast)


def allocate(parts: Sequence[Part], dtype: torch.dtype, device: torch.device) -> list[Segment]:
    """The segments that hold `parts`, in their order, filled with zeros, or the first of possible
    indices; each part is given its place.
    """

    def together(part: Part) -> str:
        # neither blocks nor a rank
        rows_alone = set(part.held) - set(place_of(part.held)) == {"format"}
        return part.held["format"] if rows_alone else part.name

    segments = []
    for _, group in groupby(parts, key=together):
        members = list(group)
        shape = sum(part.share.shape[0] for part in members), members[0].share.shape[1]
        tensors = {
            suffix: torch.arange(*size, dtype=kind, device=device)
            if suffix == "weight_pivots"
            else torch.full(size, _PAIR if kind == torch.int16 else 0, dtype=kind, device=device)
            for suffix, (kind, size) in specs(members[0].held, shape, dtype).items()
        }
        segments.append(Segment(members[0].held, tensors, shape, dtype))
        start = 0
        for part in members if len(members) > 1 else ():
            stop = start + part.share.shape[0]
            part.place = {suffix: tensor[start:stop] for suffix, tensor in tensors.items()}
            start = stop
        if len(members) == 1:
            members[0].place = tensors
    return segments

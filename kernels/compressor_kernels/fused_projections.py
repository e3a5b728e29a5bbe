"""Linears that read the same input, computed by one launch: q, k and v of an attention, gate and up
of an MLP.

Their cores are rows of one core; each linear keeps its own as a view. The first that is called with
an input computes for all, and what it computed for the others waits for them on the input itself:
no module keeps anything between two calls, so that any number of threads may call them. Nothing
about the order or the number of calls is assumed: an input that is new, was changed in place or is
asked for a second time is computed.

In a graph that torch.compile traces, changes in place are not seen: there an input must not be
changed by a method (`x.add_(1)`) between two of its projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor_kernels.layouts import Layout


class Projection(Protocol):
    """What a linear has that can be fused: `Sparse24Linear`."""

    in_features: int
    out_features: int
    bias: Any  # a parameter, or None
    layout: Any  # the kind of its core
    fused: Any  # what computes for it too, or None
    place: int  # of it among those

    @property
    def core(self) -> Layout:
        """Its core, as it is held."""
        ...

    def hold(self, core: Any) -> None:
        """Take another core, of the same weight."""


class FusedProjections:
    """The joined core of `linears` and their joined bias, of which each holds its own rows as
    views.
    """

    def __init__(self, linears: Sequence[Projection], core: Layout, bias: Tensor | None) -> None:
        self.linears, self.core, self.bias = tuple(linears), core, bias
        self.sizes = [linear.out_features for linear in linears]

    def takes(self, x: Tensor) -> bool:
        """Whether one launch may compute for all: no gradient is asked for, and no other dtype.

        Of a tensor made in inference mode it cannot be told whether it was changed in place.
        """
        if torch.is_grad_enabled() and (x.requires_grad or any(map(_trains, self.linears))):
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        return torch.compiler.is_compiling() or not x.is_inference()

    def __call__(self, place: int, x: Any) -> Tensor:
        """`linears[place](x)`, computed now or when another of them was called with x."""
        version = 0 if torch.compiler.is_compiling() else x._version
        waiting = getattr(x, "_projections", None)  # whose, of which version of x, the columns
        if waiting is not None and waiting[0] is self and waiting[1] == version:
            mine = waiting[2].pop(place, None)
            if not waiting[2] and not torch.compiler.is_compiling():
                vars(x).pop("_projections", None)
            if mine is not None:
                return mine
        columns = dict(enumerate(self.core.linear(x, self.bias).split(self.sizes, -1)))
        mine = columns.pop(place)
        x._projections = (self, version, columns)
        return mine


def fuse(linears: Sequence[Projection]) -> bool:
    """Let `linears` compute together. False, and nothing changes, where layouts, devices or sizes
    do not allow it.
    """
    kinds = {(one.layout, one.in_features, one.core.dtype, one.core.device) for one in linears}
    joined = None
    if len(linears) > 1 and len(kinds) == 1:
        joined = linears[0].layout.join([one.core for one in linears])
    if joined is None:
        return False
    core, parts = joined
    for linear, part in zip(linears, parts, strict=True):
        linear.hold(part)
    fused = FusedProjections(linears, core, _join_biases(linears, core))
    for place, linear in enumerate(linears):
        linear.fused, linear.place = fused, place
    return True


def _trains(linear: Projection) -> bool:
    return linear.bias is not None and linear.bias.requires_grad


def _join_biases(linears: Sequence[Projection], core: Layout) -> Tensor | None:
    """One bias of all, zero for a linear that has none; each bias goes on as a view of it."""
    if all(linear.bias is None for linear in linears):
        return None
    joined = torch.zeros(core.out_features, dtype=core.dtype, device=core.device)
    for linear, part in zip(
        linears, joined.split([one.out_features for one in linears]), strict=True
    ):
        if linear.bias is not None:
            part.copy_(linear.bias.detach())
            linear.bias.data = part
    return joined

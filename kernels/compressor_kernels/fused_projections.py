"""Linears that read the same input, computed by one launch: q, k and v of an attention, gate and up
of an MLP.

Their weights in fragment order are row tiles of one tensor; each linear keeps its own as a view.
The first that is called with an input computes for all, the others take their columns when they are
called with the same tensor. Nothing about the order or the number of calls is assumed: an input
that is new, changed in place or seen before is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor_kernels.fragments import Fragments
from compressor_kernels.linear import Sparse24Linear
from compressor_kernels.sparse24 import new_semaphore, sparse24_fragments


class Siblings:
    """The shared weight of `linears`, and the columns of y that were not yet asked for."""

    def __init__(self, linears: Sequence[Sparse24Linear]) -> None:
        self.linears = tuple(linears)
        parts = [linear.packed for linear in linears]
        self.weight = Fragments(*(torch.cat(same) for same in zip(*parts, strict=True)))
        self.sizes = [linear.out_features for linear in linears]
        self.bias = _joined_bias(linears)
        self.semaphore = new_semaphore(sum(self.sizes), self.weight.words.device)
        self.x: Any = None
        self.version = 0
        self.columns: list[Any] = [None] * len(self.sizes)

    def __call__(self, linear: Sparse24Linear, x: Tensor) -> Tensor:
        """`linear(x)`, computed now or by the sibling that was called with x before."""
        tracing = torch.compiler.is_compiling()
        if not tracing and x.is_inference():
            return linear.alone(x)  # whether it was changed in place cannot be told
        version = 0 if tracing else x._version
        place = self.linears.index(linear)
        if self.x is not x or self.version != version or self.columns[place] is None:
            y = sparse24_fragments(x, self.weight, sum(self.sizes), self.bias, self.semaphore)
            self.x, self.version, self.columns = x, version, list(y.split(self.sizes, -1))
        mine, self.columns[place] = self.columns[place], None
        if all(columns is None for columns in self.columns):
            self.x = None
        return mine


def join(linears: Sequence[Sparse24Linear]) -> bool:
    """Let `linears` compute together. False, and nothing changes, where their layouts, devices or
    sizes do not allow it.
    """
    first = linears[0]
    fits = all(
        linear.weight_fragments is not None
        and linear.in_features == first.in_features
        and linear.weight_fragments.device == first.weight_fragments.device
        and linear.weight_fragments.dtype == first.weight_fragments.dtype
        and (linear.out_features % 16 == 0 or linear is linears[-1])
        for linear in linears
    )
    if fits and len(linears) > 1:
        together, start = Siblings(linears), 0
        for linear in linears:
            end = start + len(linear.weight_words)
            linear.weight_fragments = nn.Parameter(
                together.weight.values[start:end], requires_grad=False
            )
            linear.weight_words = together.weight.words[start:end]
            linear.siblings, start = together, end
        return True
    return False


def _joined_bias(linears: Sequence[Sparse24Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    dtype, device = linears[0].weight_fragments.dtype, linears[0].weight_fragments.device
    zeros = (torch.zeros(linear.out_features, dtype=dtype, device=device) for linear in linears)
    return torch.cat(
        [
            zero if linear.bias is None else linear.bias
            for linear, zero in zip(linears, zeros, strict=True)
        ]
    )

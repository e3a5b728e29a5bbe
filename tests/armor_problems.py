"""Layers and factors that the tests of ARMOR share."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.armor import Armor
from compressor.methods.armor_algebra import (
    Factors,
    diagonal_blocks,
    eye_blocks,
    right,
)
from compressor.pattern import Pattern
from compressor.stats import InputStats

P24 = Pattern.parse("2:4")
FAST = {"iterations": 6, "finish": 2}


def layer(
    rows: int = 48, columns: int = 64, seed: int = 0, tokens: int = 1024
) -> tuple[Tensor, InputStats]:
    """A heavy-tailed weight and the statistics of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * torch.exp(
        0.5 * torch.randn(rows, columns, generator=g)
    )
    common = torch.randn(tokens, 8, generator=g) @ torch.randn(8, columns, generator=g) / 8**0.5
    x = common + torch.randn(tokens, columns, generator=g)
    stats = InputStats(columns, gram=True)
    stats.update(x * torch.exp(0.5 * torch.randn(columns, generator=g)))
    return weight, stats


def state(
    rows: int, columns: int, block_a: int, block_b: int, seed: int
) -> tuple[Tensor, Tensor, Factors]:
    """A weight, a positive definite Hessian and factors away from the identity, all float64."""
    weight, stats = layer(rows, columns, seed)
    g = torch.Generator().manual_seed(seed + 1)
    gram = stats.gram.double() / stats.tokens + 0.01 * torch.eye(columns).double()
    mask = P24.mask(torch.rand(rows, columns, generator=g))
    a, b = (eye_blocks(n, k, weight) for n, k in ((rows, block_a), (columns, block_b)))
    a, b = (m + 0.3 * torch.randn(m.shape, generator=g) for m in (a, b))
    return weight.double(), gram, Factors(a.double(), (weight * mask).double(), mask, b.double())


def absorbed(weight: Tensor, gram: Tensor, factors: Factors) -> tuple[Tensor, Factors]:
    """The separable problem whose Hessian is the diagonal blocks of `gram`."""
    root = torch.linalg.cholesky(diagonal_blocks(gram, factors.b.shape[1]))
    return right(weight, root), factors._replace(b=factors.b @ root)


def output_loss(weight: Tensor, compressed: Tensor, stats: InputStats) -> float:
    difference = (weight.float() - compressed.float()).double()
    return ((difference @ stats.gram.double()) * difference).sum().item()


def extra(form: Armor) -> int:
    return form.a.numel() + form.b.numel()

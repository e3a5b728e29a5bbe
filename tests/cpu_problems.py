"""Random 2:4 weights and the literal twins of the CPU kernels, in float64."""

import pytest
import torch

from compressor_kernels.cpu.build import kernels
from compressor_kernels.packing import pack24

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BARS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # relative RMS


def here():
    """Skip where the kernels cannot run, and say why."""
    if problem := kernels().problem:
        pytest.skip(problem)


def weight24(out, columns, dtype, seed=0):
    """`[out, in]` with two of each four kept, and some groups with one or none."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns // 4, 4, generator=generator)
    kept = weight.abs().argsort(-1).argsort(-1) > 1
    kept[::3, ::2, 0] = False
    kept[1::5, 1::3] = False
    return (weight * kept).view(out, columns).to(dtype)


def random(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def named_columns(metadata, half):
    """The column of each stored value, `[out, in / 2]`, read bit by bit."""
    columns = torch.empty(len(metadata), half, dtype=torch.int64)
    for row, words in enumerate(metadata.tolist()):
        for place in range(half):
            group = place // 2
            bits = (words[group // 4] & 0xFFFF) >> (4 * (group % 4) + 2 * (place % 2))
            columns[row, place] = 4 * group + (bits & 3)
    return columns


def product(x, values, metadata, bias=None):
    """y[m, r] = sum of values[r, j] x[m, the column that (r, j) names], and nothing else."""
    columns = named_columns(metadata, values.shape[1])
    y = (x.double()[:, columns] * values.double()).sum(-1)
    return y if bias is None else y + bias.double()


def blocks(x, stack):
    """blockdiag(stack) x, block by block."""
    size = stack.shape[1]
    parts = [x[:, size * i : size * i + size] @ block.double().T for i, block in enumerate(stack)]
    return torch.cat(parts, 1)


def off(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


def packed(out, columns, dtype, seed=0):
    return pack24(weight24(out, columns, dtype, seed))

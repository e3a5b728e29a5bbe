import math

import pytest
import torch

from compressor.methods.wanda import compress
from compressor.pattern import Pattern
from compressor.stats import InputStats


def literal_wanda(weight, x, pattern):
    """The formula in float64, row by row: score |W_ij| ‖X_j‖, the smallest of each group pruned,
    lower columns first.
    """
    norms = [math.sqrt(sum(value * value for value in column)) for column in x.double().T.tolist()]
    mask = []
    for row in weight.double().tolist():
        size = pattern.m or len(row)
        drop = size - pattern.n if pattern.m else math.floor(len(row) * pattern.sparsity)
        kept = [True] * len(row)
        for start in range(0, len(row), size):
            scores = sorted(
                (abs(row[column]) * norms[column], column) for column in range(start, start + size)
            )
            for _, column in scores[:drop]:
                kept[column] = False
        mask.append(kept)
    return torch.tensor(mask)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "50%", "29%", "70%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 64), (17, 40)])
def test_mask_equals_the_formula(text, dtype, rows, columns):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    x = (torch.randn(96, columns, generator=generator) * torch.logspace(-2, 2, columns)).to(dtype)
    x[:, [1, columns // 2, columns - 1]] = 0  # dead channels
    stats = InputStats(columns)
    for batch in x.reshape(4, 24, columns):
        stats.update(batch)
    pattern = Pattern.parse(text)
    pruned = compress(weight, stats, pattern).dense()
    mask = literal_wanda(weight, x, pattern)
    assert torch.equal(pruned != 0, mask & (weight != 0))
    assert torch.equal(pruned[mask], weight[mask])  # kept weights are untouched

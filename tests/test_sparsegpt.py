import math

import pytest
import torch

from compressor.errors import NumericalError, UsageError
from compressor.methods.sparsegpt import compress
from compressor.pattern import Pattern
from compressor.stats import InputStats
from tests.test_methods import correlated


def literal_sparsegpt(weight, gram, tokens, pattern, damp=0.01, block=128):
    """Algorithm 1 one weight at a time in float64, with the inverse of the remaining Hessian
    computed anew at each column.
    """
    W = weight.double().clone()
    rows, columns = W.shape
    H = gram.double() * 2 / tokens
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H += damp * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = [torch.linalg.inv(H[j:, j:]) for j in range(columns)]
    mask = torch.ones(rows, columns, dtype=torch.bool)

    def score(row, j):
        return (W[row, j] ** 2 / inverse[j][0, 0]).item()

    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if not pattern.m:
            ranked = sorted(
                (score(row, j), row, j) for row in range(rows) for j in range(start, stop)
            )
            for _, row, j in ranked[: math.floor(len(ranked) * pattern.sparsity)]:
                mask[row, j] = False
        for j in range(start, stop):
            if pattern.m and j % pattern.m == 0:
                for row in range(rows):
                    ranked = sorted((score(row, k), k) for k in range(j, j + pattern.m))
                    for _, k in ranked[: pattern.m - pattern.n]:
                        mask[row, k] = False
            for row in range(rows):
                if not mask[row, j]:
                    W[row, j:] -= W[row, j] / inverse[j][0, 0] * inverse[j][0]
                    W[row, j] = 0
    return W


@pytest.mark.parametrize("text", ["2:4", "4:8", "50%", "70%"])
@pytest.mark.parametrize(("rows", "columns", "block"), [(12, 48, 16), (7, 40, 128)])
def test_equals_the_algorithm(text, rows, columns, block):
    weight, stats = correlated(rows, columns)
    pattern = Pattern.parse(text)
    expected = literal_sparsegpt(weight, stats.gram, stats.tokens, pattern, block=block)
    pruned = compress(weight, stats, pattern, block_size=block).dense()
    assert ((pruned != 0) == (expected != 0)).float().mean() >= 0.999
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


def test_dead_channels_and_fewer_tokens_than_channels():
    x = torch.randn(10, 64)
    x[:, 5] = 0
    stats = InputStats(64, gram=True)
    stats.update(x)
    pattern = Pattern.parse("2:4")
    pruned = compress(torch.randn(8, 64), stats, pattern).dense()
    assert bool(torch.isfinite(pruned).all())
    assert pattern.is_legal(pruned)
    assert not pruned[:, 5].any()


def test_options_and_hopeless_matrices_are_refused():
    weight, stats = correlated(4, 16)
    with pytest.raises(UsageError, match="block_size=6"):
        compress(weight, stats, Pattern.parse("2:4"), block_size=6)
    stats.gram[0, 0] = -1e9
    with pytest.raises(NumericalError, match="cannot be factored"):
        compress(weight, stats, Pattern.parse("2:4"))

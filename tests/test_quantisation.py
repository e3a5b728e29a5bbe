"""Integer grids, rounding to the nearest and GPTQ, each against a slow literal twin."""

import pytest
import torch

from compressor.errors import NumericalError
from compressor.quantisation import Grid, gptq, nearest
from compressor.stats import InputStats, output_error
from tests.test_methods import correlated


def literal_grid(group, bits):
    """Scale and zero point of a list of numbers: the range, or that part of it, whose integers are
    closest to them.
    """
    top, found = 2**bits - 1, []
    for part in [1 - step / 20 for step in range(11)]:
        low, high = min([0.0, *group]) * part, max([0.0, *group]) * part
        scale = torch.tensor((high - low) / top).bfloat16().item() or 1.0
        zero = min(max(round(-low / scale), 0), top)
        error = sum((literal_round(w, scale, zero, bits) - w) ** 2 for w in group)
        found.append((error, scale, zero))
    return min(found, key=lambda each: each[0])[1:]


def literal_round(w, scale, zero, bits):
    return scale * (min(max(round(w / scale) + zero, 0), 2**bits - 1) - zero)


def literal_nearest(weight, bits, group):
    rounded = weight.double().clone()
    for row in rounded:
        for start in range(0, len(row), group):
            part = row[start : start + group].tolist()
            scale, zero = literal_grid(part, bits)
            row[start : start + group] = torch.tensor(
                [literal_round(w, scale, zero, bits) for w in part]
            )
    return rounded


def literal_gptq(weight, stats, bits, group, damp=0.01):
    """Algorithm 1 a column at a time in float64, the inverse of the remaining Hessian anew at each
    column.
    """
    W = weight.double().clone()
    H = stats.gram.double() * 2 / stats.tokens
    H.diagonal()[H.diagonal() == 0] = 1
    H += damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    for j in range(W.shape[1]):
        if j % group == 0:
            grids = [literal_grid(row[j : j + group].tolist(), bits) for row in W]
        inverse = torch.linalg.inv(H[j:, j:])
        for row, (scale, zero) in zip(W, grids, strict=True):
            rounded = literal_round(row[j].item(), scale, zero, bits)
            row[j:] -= (row[j] - rounded) / inverse[0, 0] * inverse[0]
            row[j] = rounded
    return W


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("columns", "group"), [(48, 16), (40, 64), (37, 8)])
def test_nearest_equals_the_definition(bits, columns, group):
    weight, _ = correlated(9, columns)
    weight[0] = 0
    weight[1] = weight[1].abs() + 1  # zero is in every range
    weight[2] = 0.5 ** torch.arange(columns)
    found = nearest(weight, Grid(bits, group))
    expected = literal_nearest(weight, bits, group)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("columns", "group"), [(48, 16), (40, 64), (37, 8)])
def test_gptq_equals_the_algorithm(bits, columns, group):
    weight, stats = correlated(9, columns)
    found = gptq(weight, stats, Grid(bits, group)).double()
    expected = literal_gptq(weight, stats, bits, group)
    # where float32 and float64 round one number apart, the rest of its row goes another way
    same = torch.isclose(found, expected, rtol=1e-3, atol=1e-4).all(1)
    assert same.sum() >= 8


def test_gptq_beats_the_nearest_on_correlated_inputs_only():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    x = torch.randn(400, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    stats = InputStats(64, gram=True)
    stats.update(x + torch.randn(400, 64, generator=generator))
    for bits in (3, 4):
        rounded = [gptq(weight, stats, Grid(bits, 16)), nearest(weight, Grid(bits, 16))]
        ours, plain = (output_error(weight, each, stats) for each in rounded)
        assert ours < 0.5 * plain
    white = InputStats(64, gram=True)
    white.update(torch.eye(64))
    assert torch.equal(gptq(weight, white, Grid(4, 16)), nearest(weight, Grid(4, 16)))


def test_a_group_has_no_more_values_than_its_bits_allow_and_more_bits_are_closer():
    weight, stats = correlated(16, 64)
    errors = []
    for bits in (2, 3, 4, 8):
        grid = Grid(bits, 16)
        for rounded in (nearest(weight, grid), gptq(weight, stats, grid)):
            assert all(len(part.unique()) <= 2**bits for part in rounded.view(-1, 16))
        errors.append((nearest(weight, grid) - weight).norm().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_kept(dtype):
    weight, stats = correlated(8, 40)
    for rounded in (nearest(weight.to(dtype), Grid(4)), gptq(weight.to(dtype), stats, Grid(4))):
        assert rounded.dtype == dtype
        assert rounded.shape == weight.shape


def test_what_it_takes_is_counted():
    assert Grid(4).nbytes(128, 128) * 8 / 128**2 == 4 + 20 / 64
    assert Grid(3).nbytes(128, 128) * 8 / 128**2 == 3 + 19 / 64
    assert Grid(4).nbytes(2, 65) == 2 * (65 * 4 + 2 * 20) // 8


def test_gptq_takes_dead_inputs_and_refuses_what_cannot_be_factored():
    weight, stats = correlated(8, 32)
    stats.gram[:, 5] = stats.gram[5] = 0
    rounded = gptq(weight, stats, Grid(4))
    assert torch.isfinite(rounded).all()
    stats.gram.fill_(torch.nan)
    with pytest.raises(NumericalError, match="cannot be factored"):
        gptq(weight, stats, Grid(4))

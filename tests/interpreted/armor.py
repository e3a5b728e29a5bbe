"""ARMOR in two launches and the low-rank products against float64 at awkward sizes."""

import pytest
import torch

from compressor_kernels import armor as ops
from compressor_kernels.fragments import to_fragments
from compressor_kernels.lowrank import lowrank, run_skinny
from compressor_kernels.packing import pack24
from compressor_kernels.pivot import pivot, row_order, scatter
from compressor_kernels.sparse24 import new_semaphore
from tests.interpreted.sparse24 import DTYPES, ROWS
from tests.interpreted.tolerance import assert_close
from tests.test_packing import sparse


def problem(rows, out_features, in_features, size_a, size_b, dtype):
    torch.manual_seed(rows)
    a = torch.randn(out_features // size_a, size_a, size_a).to(dtype) / size_a**0.5
    b = torch.randn(in_features // size_b, size_b, size_b).to(dtype) / size_b**0.5
    core = sparse(out_features, in_features, rows, dtype)
    x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features).to(dtype)
    expected = (
        x.double()
        @ torch.block_diag(*b.double()).T
        @ core.double().T
        @ torch.block_diag(*a.double()).T
        + bias.double()
    )
    return x, core, a, b, bias, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("shape", "stack", "split"),
    [
        ((64, 128, 16, 32), 2, 1),  # several blocks of A in a program
        ((256, 192, 128, 64), 1, 3),  # several programs for a block of A
        ((96, 64, 32, 64), 2, 2),  # a last program that is not full
    ],
)
def test_two_launches(rows, shape, stack, split, dtype):
    x, core, a, b, bias, expected = problem(rows, *shape, dtype)
    semaphore = new_semaphore(len(core), "cpu")
    config = {"warps": 4, "stack": stack, "row_tiles": 2, "split": split, "unroll": 2}
    assert_close(
        ops.run_armor(x, to_fragments(*pack24(core)), a, b, bias, semaphore, config), expected
    )
    assert not semaphore.any()


@pytest.mark.parametrize(
    "shape", [(256, 256, 256, 128), (24, 36, 12, 18), (64, 128, 16, 32)], ids=str
)
@pytest.mark.parametrize("rows", [2, 65])
def test_the_public_function_chooses(shape, rows):
    x, core, a, b, bias, expected = problem(rows, *shape, torch.float16)
    packed, semaphore = pack24(core), new_semaphore(shape[0], "cpu")
    assert_close(ops.armor(x[None], to_fragments(*packed), a, b, bias, semaphore)[0], expected)
    assert_close(ops.armor(x[None], packed, a, b, bias, semaphore)[0], expected)
    assert not semaphore.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_low_rank(rows, dtype):
    torch.manual_seed(rows)
    u, v, bias = torch.randn(100, 36) / 6, torch.randn(36, 130) / 11, torch.randn(100)
    u, v, bias, x = u.to(dtype), v.to(dtype), bias.to(dtype), torch.randn(rows, 130).to(dtype)
    semaphore = new_semaphore(100, "cpu")
    assert_close(
        lowrank(x, u, v, bias, semaphore), x.double() @ v.double().T @ u.double().T + bias.double()
    )
    config = {"kernel": "dot", "bm": 16, "bn": 32, "bk": 64, "split": 3, "warps": 4, "stages": 3}
    assert_close(run_skinny(x, v, None, semaphore, config), x.double() @ v.double().T)
    assert not semaphore.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("with_bias", "split"), [(True, 3), (False, 1)])
def test_pivots(rows, dtype, with_bias, split):
    torch.manual_seed(rows)
    c, v = (torch.randn(64, 36) / 6).to(dtype), (torch.randn(36, 130) / 11).to(dtype)
    bias = torch.randn(100).to(dtype) if with_bias else None
    pivots = torch.randperm(100)[:36].sort().values.int()
    x, order = torch.randn(rows, 130).to(dtype), row_order(pivots, 100)
    semaphore = new_semaphore(100, "cpu")
    expected = torch.empty(rows, 100, dtype=torch.float64)
    inner = (x.double() @ v.double().T).to(dtype)
    expected[:, order] = torch.cat([inner.double(), inner.double() @ c.double().T], 1)
    if bias is not None:
        expected += bias.double()
    assert_close(pivot(x, v, c, order, bias, semaphore), expected)
    config = {"kernel": "dot", "bm": 16, "bn": 32, "bk": 16, "warps": 4, "stages": 3}
    y = scatter(inner, c, order, bias, semaphore, {**config, "split": split})
    assert_close(y, expected)
    if bias is None:
        assert torch.equal(y[:, pivots.long()], inner)
    assert not semaphore.any()

"""The 2:4 kernels against float64 at awkward sizes, and what they share: split sums, semaphores,
layouts.
"""

import pytest
import torch

from compressor_kernels import probe
from compressor_kernels import sparse24 as ops
from compressor_kernels.fragments import to_fragments
from compressor_kernels.packing import pack24
from tests.interpreted.tolerance import assert_close
from tests.test_packing import sparse

ROWS = [1, 3, 7, 16, 17, 63]
SHAPES = [(40, 132), (128, 192), (5, 4)]  # out, in: neither, both and none of the tiles filled
DTYPES = [torch.float16, torch.bfloat16]
MMA = {
    "kernel": "mma",
    "warps": 4,
    "stack": 1,
    "row_tiles": 1,
    "split": 1,
    "unroll": 2,
    "ordered": False,
}
DOT = {"kernel": "dot", "bm": 16, "bn": 32, "bk": 64, "split": 1, "warps": 4, "stages": 3}


def problem(rows, shape, dtype, most=2):
    torch.manual_seed(rows)
    weight = sparse(*shape, seed=rows, dtype=dtype, most=most)  # groups with 0, 1 and 2 non-zeros
    return torch.randn(rows, shape[1]).to(dtype), weight, torch.randn(shape[0]).to(dtype)


def check(x, weight, bias, run):
    semaphore = ops.new_semaphore(len(weight), "cpu")
    y = run(semaphore)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_close(y, expected)
    assert not semaphore.any(), "the semaphore is zero again"
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "settings",
    [
        {},  # all warps along K
        {
            "stack": 4,
            "row_tiles": 2,
            "split": 3,
            "ordered": True,
        },  # all warps along the rows, more rows than there are
        {"stack": 2, "row_tiles": 2, "split": 2, "unroll": 1},
    ],
    ids=["along", "stacked", "both"],
)
def test_mma(rows, shape, dtype, settings):
    x, weight, bias = problem(rows, shape, dtype)
    fragments = to_fragments(*pack24(weight))
    config = {**MMA, **settings}
    check(
        x,
        weight,
        bias,
        lambda semaphore: ops.run_fragments(x, fragments, len(weight), bias, semaphore, config),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("split", [1, 3])
def test_gemv(shape, dtype, split):
    x, weight, bias = problem(1, shape, dtype)
    fragments = to_fragments(*pack24(weight))
    config = {"kernel": "gemv", "warps": 2, "split": split}
    check(
        x,
        weight,
        bias,
        lambda semaphore: ops.run_fragments(x, fragments, len(weight), bias, semaphore, config),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("split", [1, 2])
def test_dot(rows, shape, dtype, split, monkeypatch):
    monkeypatch.setattr(
        "compressor_kernels.backend.nvidia", lambda: split == 1
    )  # with and without inline assembly
    x, weight, _ = problem(rows, shape, dtype)
    values, metadata = pack24(weight)
    check(
        x,
        weight,
        None,
        lambda semaphore: ops.run_stored(
            x, values, metadata, None, semaphore, {**DOT, "split": split}
        ),
    )


@pytest.mark.parametrize("most", [0, 1])
def test_empty_groups(most):
    x, weight, bias = problem(3, (40, 132), torch.float16, most)
    packed = pack24(weight)
    check(x, weight, bias, lambda semaphore: ops.run_stored(x, *packed, bias, semaphore, DOT))
    check(
        x,
        weight,
        bias,
        lambda semaphore: ops.run_fragments(x, to_fragments(*packed), 40, bias, semaphore, MMA),
    )


@pytest.mark.parametrize("assembly", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (37, 260)])
def test_the_dense_weight_is_exact(shape, assembly, monkeypatch):
    monkeypatch.setattr("compressor_kernels.backend.nvidia", lambda: assembly)
    weight = sparse(*shape, seed=0, dtype=torch.bfloat16)
    packed = pack24(weight)
    assert torch.equal(ops.unpack_stored(*packed), weight)
    assert torch.equal(ops.unpack_fragments(to_fragments(*packed), *shape), weight)


@pytest.mark.parametrize("rows", [2, 20, 97])
def test_the_public_functions_choose_a_kernel(rows):
    x, weight, bias = problem(rows, (48, 64), torch.float16)
    packed, x = pack24(weight), x.view(1, rows, 64)
    expected = x.double() @ weight.double().T + bias.double()
    semaphore = ops.new_semaphore(48, "cpu")
    assert_close(ops.sparse24(x, *packed, bias, semaphore), expected)
    assert_close(ops.sparse24_fragments(x, to_fragments(*packed), 48, bias, semaphore), expected)
    assert_close(
        ops.sparse24_fragments(x[:, :, None], to_fragments(*packed), 48),
        expected[:, :, None] - bias.double(),
    )


def test_the_self_check_sees_a_wrong_fragment(monkeypatch):
    assert probe.fragments_are_right(torch.device("cpu"))
    plain = to_fragments
    swapped = lambda *packed: plain(*packed)._replace(values=plain(*packed).values.flip(2))  # noqa: E731  # the two steps
    monkeypatch.setattr(probe, "to_fragments", swapped)
    assert not probe.fragments_are_right(torch.device("cpu"))


def test_an_input_that_begins_in_the_middle_of_a_word():
    x, weight, bias = problem(3, (40, 132), torch.float16)
    shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)
    fragments = to_fragments(*pack24(weight))
    check(
        shifted,
        weight,
        bias,
        lambda semaphore: ops.run_fragments(shifted, fragments, 40, bias, semaphore, MMA),
    )

"""The CPU kernels against literal twins: sizes that fill no tile, all dtypes, few and many rows."""

import copy
import pickle
import time

import pytest
import torch
from torch import nn

from compressor_kernels import reference
from compressor_kernels.cpu import ops
from compressor_kernels.cpu.build import MATRICES, _cpu
from compressor_kernels.cpu.tiles import from_tiles, to_tiles
from compressor_kernels.fused_projections import fuse
from compressor_kernels.layouts import InTiles, Stored
from compressor_kernels.linear import ArmorLinear, LowRankLinear, Sparse24Linear
from compressor_kernels.one_row import OneRowLinear, give_back, take_over
from compressor_kernels.packing import pack24
from compressor_kernels.pivot import row_order
from compressor_kernels.pivot_linear import PivotLinear
from tests.at_once import at_once
from tests.cpu_problems import BARS, DTYPES, blocks, here, off, packed, product, random, weight24

SHAPES = [(1, 4), (3, 100), (7, 64), (4, 576), (50, 576), (33, 260)]  # out, in
ROWS = [*range(1, 18), 31, 32, 33, 70]
MANY = [127, 128, 129, 141, 300]  # more than meet the weight in one pass


@pytest.fixture(autouse=True)
def _kernels():
    here()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse24_for_every_number_of_rows(shape, dtype):
    (out, columns), (values, metadata) = shape, packed(*shape, dtype)
    tiles, bias = to_tiles(values, metadata), random(shape[0], dtype=dtype)
    for rows in ROWS + MANY:
        x = random(rows, columns, dtype=dtype, seed=rows)
        for added in (None, bias):
            y = ops.sparse24(x, *tiles, added, out, columns)
            assert y.dtype == dtype
            expected = product(x, values, metadata, added)
            assert off(y, expected) <= BARS[dtype], rows
            y = torch.ops.compressor_kernels.cpu_sparse24_by_panels(x, *tiles, added, out, columns)
            assert off(y, expected) <= BARS[dtype], rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "a", "b"),
    [
        ((48, 128), 16, 64),
        ((50, 576), 50, 36),
        ((6, 100), 3, 4),
        ((33, 260), 11, 1),
        ((8, 8), 1, 8),
    ],
)
def test_armor(shape, a, b, dtype):
    (out, columns), (values, metadata) = shape, packed(*shape, dtype)
    outer = random(out // a, a, a, dtype=dtype, seed=2) / a**0.5
    inner = random(columns // b, b, b, dtype=dtype, seed=3) / b**0.5
    bias, tiles = random(out, dtype=dtype), to_tiles(values, metadata)
    for rows in ROWS:
        x = random(rows, columns, dtype=dtype, seed=rows)
        y = ops.armor(x, *tiles, outer, inner, bias)
        expected = blocks(product(blocks(x.double(), inner), values, metadata), outer)
        # three products follow each other, and what is between them is rounded
        assert off(y, expected + bias.double()) <= 3 * BARS[dtype], rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out", "rank", "columns"), [(1, 1, 1), (7, 5, 33), (50, 100, 576), (130, 64, 31)]
)
def test_low_rank_and_the_dense_product(out, rank, columns, dtype):
    u, v = random(out, rank, dtype=dtype, seed=2), random(rank, columns, dtype=dtype, seed=3)
    bias = random(out, dtype=dtype)
    for rows in ROWS:
        x = random(rows, columns, dtype=dtype, seed=rows)
        inner = x.double() @ v.double().T
        assert off(ops.dense(x, v, None), inner) <= BARS[dtype]
        expected = inner.to(dtype).double() @ u.double().T + bias.double()
        assert off(ops.lowrank(x, u, v, bias), expected) <= 2 * BARS[dtype], rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("out", "rank", "columns"), [(1, 1, 1), (7, 5, 33), (150, 100, 576), (130, 64, 31), (9, 9, 40)]
)
def test_pivots(out, rank, columns, dtype, with_bias):
    v, c = random(rank, columns, dtype=dtype, seed=2), random(out - rank, rank, dtype=dtype, seed=3)
    bias = random(out, dtype=dtype) if with_bias else None
    chosen = torch.randperm(out, generator=torch.Generator().manual_seed(out))[:rank].sort().values
    order = row_order(chosen.int(), out)
    for rows in ROWS:
        x = random(rows, columns, dtype=dtype, seed=rows)
        inner = (x.double() @ v.double().T).to(dtype).double()
        expected = torch.empty(rows, out, dtype=torch.float64)
        expected[:, order] = torch.cat([inner, inner @ c.double().T], 1)
        if bias is not None:
            expected += bias.double()
        y = ops.pivot(x, v, c, order, bias)
        assert off(y, expected) <= 3 * BARS[dtype], rows
        assert off(y, reference.pivot(x, v, c, order, bias)) <= 3 * BARS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_x_has_the_bits_that_it_has_alone_and_threads_change_none(dtype):
    values, metadata = packed(256, 1028, dtype)
    tiles = to_tiles(values, metadata)
    outer, inner = random(16, 16, 16, dtype=dtype), random(257, 4, 4, dtype=dtype)
    u, v = random(256, 100, dtype=dtype), random(100, 1028, dtype=dtype)
    runs = (
        lambda x: ops.sparse24(x, *tiles, None, 256, 1028),
        lambda x: ops.armor(x, *tiles, outer, inner, None),
        lambda x: ops.lowrank(x, u, v, None),
        lambda x: ops.pivot(x, v, u, torch.arange(356), None),
    )
    for run in runs:
        # beyond 32 rows torch multiplies the thin factors, and all in bfloat16 where it has AMX
        alone = run is runs[0] and not (dtype == torch.bfloat16 and MATRICES in _cpu())
        x = random(150 if alone else 32, 1028, dtype=dtype)
        whole = run(x)
        assert torch.equal(whole, torch.cat([run(row[None]) for row in x]))
        torch.set_num_threads(2)
        assert torch.equal(whole, run(x))
        assert torch.equal(whole[:1], run(x[:1]))
        torch.set_num_threads(1)


def test_the_tiles_give_the_stored_bytes_back():
    for dtype in DTYPES:
        for out, columns in SHAPES:
            stored = packed(out, columns, dtype)
            values, positions = to_tiles(*stored)
            assert values.nbytes == 8 * positions.nbytes * values.itemsize // 2
            back = from_tiles(values, positions, out, columns)
            assert all(torch.equal(a, b) for a, b in zip(stored, back, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_reaches_the_rows_that_name_its_column(dtype):
    values, metadata = packed(20, 132, dtype)
    tiles = to_tiles(values, metadata)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for column in (0, 5, 66, 131):
            for rows in (1, 4, 17):
                x = random(rows, 132, dtype=dtype)
                x[rows // 2, column] = bad
                y = ops.sparse24(x, *tiles, None, 20, 132)
                expected = product(x, values, metadata)
                assert torch.equal(y.isnan(), expected.isnan())
                assert torch.equal(y.isinf(), expected.isinf())
                assert torch.equal(y[y.isinf()].double(), expected[expected.isinf()])
                assert y.isfinite().any()
                assert not y.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_of_any_strides(dtype):
    values, metadata = packed(24, 100, dtype)
    tiles = to_tiles(values, metadata)
    wide = random(9, 2, 300, dtype=dtype)
    for x in (wide[:, 0, 100:200], wide[:, 1, ::3], wide[::2, :, 7:107], wide[:3, 0, :100].mT.mT):
        y = ops.sparse24(x, *tiles, None, 24, 100)
        assert y.shape == (*x.shape[:-1], 24)
        expected = ops.sparse24(x.reshape(-1, 100).contiguous(), *tiles, None, 24, 100)
        assert torch.equal(y.reshape(-1, 24), expected)
    turned = random(100, 5, dtype=dtype).T
    same = ops.sparse24(turned.contiguous(), *tiles, None, 24, 100)
    assert torch.equal(ops.sparse24(turned, *tiles, None, 24, 100), same)
    assert ops.sparse24(wide[:0, 0, :100], *tiles, None, 24, 100).shape == (0, 24)
    assert ops.sparse24(wide[0, 0, :100], *tiles, None, 24, 100).shape == (24,)


def test_what_does_not_fit_is_refused_before_a_kernel_sees_it():
    values, positions = to_tiles(*packed(24, 100, torch.float32))
    x, bias = random(2, 100), random(24)
    for call, match in (
        (lambda: ops.sparse24(x[:, :96], values, positions, None, 24, 100), "x is"),
        (lambda: ops.sparse24(x.bfloat16(), values, positions, None, 24, 100), "x is"),
        (lambda: ops.sparse24(x, values[1:], positions, None, 24, 100), "values is"),
        (lambda: ops.sparse24(x, values, positions[:, 1:], None, 24, 100), "positions is"),
        (lambda: ops.sparse24(x, values, positions, bias[1:], 24, 100), "bias is"),
        (lambda: ops.sparse24(x, values, positions, None, 29, 100), "values is"),
        (lambda: ops.sparse24(x, values.mT, positions, None, 24, 100), "values is"),
        (
            lambda: ops.armor(x, values, positions, random(2, 12, 11), random(25, 4, 4), None),
            "a is",
        ),
        (lambda: ops.lowrank(x, random(24, 8), random(7, 100), None), "u is"),
        (lambda: ops.pivot(x, random(7, 100), random(17, 8), torch.arange(24), None), "c is"),
        (lambda: ops.pivot(x, random(7, 100), random(17, 7), torch.arange(23), None), "rows is"),
        (lambda: ops.pivot(x, random(7, 100), random(17, 7), torch.arange(1, 25), None), "of 24"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    stored = packed(24, 100, torch.float32)
    stored[1][3, 0] &= ~0xF00
    with pytest.raises(ValueError, match="row 3, group 2"):
        InTiles.prepare(*stored)


def modules(dtype=torch.float32):
    """One of each kind, 132 -> 40, prepared."""
    stored = dict(zip(("weight_values", "weight_metadata"), packed(40, 132, dtype), strict=True))
    common = {"bias": True, "dtype": dtype}
    made = [
        (Sparse24Linear(132, 40, **common), stored),
        (
            ArmorLinear(132, 40, block_a=8, block_b=12, **common),
            stored
            | {
                "weight_a": random(5, 8, 8, dtype=dtype),
                "weight_b": random(11, 12, 12, dtype=dtype),
            },
        ),
        (
            LowRankLinear(132, 40, rank=20, **common),
            {"weight_u": random(40, 20, dtype=dtype), "weight_v": random(20, 132, dtype=dtype)},
        ),
        (
            PivotLinear(132, 40, rank=20, **common),
            {
                "weight_v": random(20, 132, dtype=dtype),
                "weight_c": random(20, 20, dtype=dtype),
                "weight_pivots": torch.arange(1, 40, 2, dtype=torch.int32),
            },
        ),
    ]
    for module, state in made:
        module.load_state_dict(state | {"bias": random(40, dtype=dtype)})
        module.requires_grad_(False)
        module.prepare_()
    return [module for module, _ in made]


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_compute_packed_and_keep_their_state(dtype):
    for module in modules(dtype):
        x = random(3, 132, dtype=dtype)
        expected = nn.functional.linear(x.double(), module.weight.double())
        y = module(x)
        assert off(y, expected + module.bias.double()) <= 6 * BARS[dtype]
        if not isinstance(module, LowRankLinear | PivotLinear):
            assert module.layout is InTiles
            assert set(module.state_dict()) >= {"weight_values", "weight_metadata"}
        else:
            assert module.cpu_kernels
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), y)
            assert all(
                torch.equal(a, module.state_dict()[n]) for n, a in other.state_dict().items()
            )
        assert module.to(torch.float64)(x.double()).dtype == torch.float64
        assert module.to("meta")(x.double().to("meta")).shape == (3, 40)


def test_torch_compile_takes_whole_modules():
    for module in modules():
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
        for x in (random(3, 132), random(2, 20, 132)):
            assert torch.equal(compiled(x), module(x))


def test_gradients_of_x_are_those_of_the_dense_weight():
    for module in modules():
        x = random(3, 132).requires_grad_()
        module(x).square().sum().backward()
        twin = x.detach().clone().requires_grad_()
        y = nn.functional.linear(twin, module.weight.detach(), module.bias)
        y.square().sum().backward()
        assert torch.allclose(x.grad, twin.grad, rtol=1e-3, atol=1e-3)


def test_two_threads_on_one_module():
    module, found = modules()[1], []
    inputs = [random(rows, 132, seed=rows) for rows in (1, 2, 5, 16, 17)]
    expected = [module(x) for x in inputs]

    def work():
        end = time.monotonic() + 5
        while time.monotonic() < end:
            found.extend(
                not torch.equal(module(x), y) for x, y in zip(inputs, expected, strict=True)
            )

    at_once([work] * 2)
    assert found
    assert not any(found)


def test_joined_projections_are_rows_of_one_weight():
    weights = [weight24(out, 132, torch.float32, seed=out) for out in (40, 8, 7)]
    linears = []
    for weight in weights:
        linear = Sparse24Linear(132, len(weight), bias=False, dtype=torch.float32)
        linear.load_state_dict(
            dict(zip(("weight_values", "weight_metadata"), pack24(weight), strict=True))
        )
        linear.prepare_()
        linears.append(linear)
    x = random(3, 132)
    alone = [linear(x) for linear in linears]
    assert fuse(linears)
    together = [linear(x) for linear in linears]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(linear.weight, w) for linear, w in zip(linears, weights, strict=True))


def test_where_no_kernel_runs_nothing_changes(monkeypatch):
    monkeypatch.setattr(InTiles, "runs_on", classmethod(lambda cls, values: False))
    module = modules()[0]
    assert module.layout is Stored
    x = random(3, 132)
    expected = reference.sparse24(x, *module.core.stored(), module.bias)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_linear_takes_one_row_of_x_to_the_kernel(bias, monkeypatch):
    linear = nn.Linear(132, 40, bias=bias, dtype=torch.bfloat16)
    plain = copy.deepcopy(linear)
    take_over(linear)
    assert type(linear) is OneRowLinear
    wide = random(1, 5, 132, dtype=torch.bfloat16)
    with torch.no_grad():
        for x in (wide[:, -1:], wide[0, 2], wide[0, :1]):
            y = linear(x)
            assert y.shape == (*x.shape[:-1], 40)
            assert torch.equal(y, ops.dense(x, linear.weight, linear.bias))
            for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
                assert torch.equal(other(x), y)
            torch._dynamo.reset()
            compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=False)
            assert torch.equal(compiled(x), y)
        monkeypatch.setattr("compressor_kernels.one_row.cpu_ops", None)  # torch's from here on
        assert torch.equal(linear(wide), plain(wide))
        assert torch.equal(linear(wide[:0]), plain(wide[:0]))
        with torch.autocast("cpu", dtype=torch.float16):
            assert linear(wide[:, -1:]).dtype == torch.float16
        assert linear.float()(wide[:, -1:].float()).dtype == torch.float32
    linear.bfloat16()(wide[:, -1:]).sum().backward()
    assert linear.weight.grad is not None
    assert linear.state_dict().keys() == plain.state_dict().keys()
    give_back(linear)
    assert type(linear) is nn.Linear


def test_a_dense_linear_that_comes_to_a_machine_without_kernels(monkeypatch):
    linear = nn.Linear(132, 40, dtype=torch.bfloat16)
    take_over(linear)
    pickled = pickle.dumps(linear)
    monkeypatch.setattr(InTiles, "usable", classmethod(lambda cls: False))
    assert type(pickle.loads(pickled)) is nn.Linear

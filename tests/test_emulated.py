"""Every kernel as it was compiled: its PTX executed without a GPU (ptx_emulator) against float64.

What the interpreter cannot show is here as it will run: the layouts that the compiler chose,
operands of inline assembly, conversions through shared memory, bfloat16, and the protocol between
programs under the weakest memory that PTX allows.
"""

import os
import re
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402

from compressor.bench.ahead import compile_ahead  # noqa: E402
from compressor_kernels import armor as armor_ops  # noqa: E402
from compressor_kernels import kernel_config, probe  # noqa: E402
from compressor_kernels import lowrank as lowrank_ops  # noqa: E402
from compressor_kernels import sparse24 as ops  # noqa: E402
from compressor_kernels.fragments import to_fragments  # noqa: E402
from compressor_kernels.packing import pack24  # noqa: E402
from compressor_kernels.pivot import pivot, row_order, scatter  # noqa: E402
from ptx_emulator.launch import Device, emulated  # noqa: E402
from tests.interpreted.armor import problem as armor_problem  # noqa: E402
from tests.interpreted.sparse24 import DOT, DTYPES, MMA, check, problem  # noqa: E402
from tests.interpreted.tolerance import assert_close  # noqa: E402
from tests.test_packing import sparse  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

FP16, BF16 = DTYPES
SHAPES = [(40, 132), (128, 192)]  # out, in: no tile filled, and all
GEMV = {"kernel": "gemv", "warps": 2}
SKINNY = {"kernel": "dot", "bm": 16, "bn": 32, "bk": 64, "warps": 4, "stages": 3}
ARMOR = {"warps": 4, "row_tiles": 2, "unroll": 2}
ALONG = {}  # all warps along K
STACKED = {
    "stack": 4,
    "row_tiles": 2,
    "split": 3,
    "unroll": 1,
    "ordered": True,
}  # all warps along the rows
BOTH = {"stack": 2, "row_tiles": 2, "split": 2, "unroll": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(params=[80, 90])
def device(request, folder):
    with emulated(Device(request.param), folder) as device:
        yield device


def run_mma(rows, shape, dtype, **settings):
    x, weight, bias = problem(rows, shape, dtype)
    fragments, config = to_fragments(*pack24(weight)), {**MMA, **settings}
    return check(
        x,
        weight,
        bias,
        lambda semaphore: ops.run_fragments(x, fragments, len(weight), bias, semaphore, config),
    )


def run_stored(rows, shape, dtype, split):
    x, weight, bias = problem(rows, shape, dtype)
    packed, config = pack24(weight), {**DOT, "split": split}
    return check(
        x, weight, bias, lambda semaphore: ops.run_stored(x, *packed, bias, semaphore, config)
    )


def run_skinny(rows, shape, dtype, split):
    x, weight, bias = problem(rows, shape, dtype)
    config = {**SKINNY, "split": split}
    return check(
        x,
        weight,
        bias,
        lambda semaphore: lowrank_ops.run_skinny(x, weight, bias, semaphore, config),
    )


def run_armor(rows, shape, dtype, **settings):
    x, core, a, b, bias, expected = armor_problem(rows, *shape, dtype)
    semaphore, config = ops.new_semaphore(len(core), "cpu"), {**ARMOR, **settings}
    y = armor_ops.run_armor(x, to_fragments(*pack24(core)), a, b, bias, semaphore, config)
    assert_close(y, expected)
    assert not semaphore.any(), "the semaphore is zero again"
    return y


@pytest.mark.parametrize(
    ("device", "rows", "dtype"),
    [(80, 1, BF16), (80, 3, FP16), (80, 8, BF16), (80, 17, BF16), (90, 3, BF16)],
    indirect=["device"],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [ALONG, STACKED, BOTH], ids=["along", "stacked", "both"])
def test_mma(device, rows, shape, dtype, settings):
    run_mma(rows, shape, dtype, **settings, pdl=device.target == 90)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("split", "dtype"), [(1, FP16), (3, BF16)])
def test_gemv(device, shape, dtype, split):
    run_mma(1, shape, dtype, **GEMV, split=split)


@pytest.mark.parametrize("shape", [*SHAPES, (37, 260)])
def test_the_dense_weight_is_exact(device, shape):
    weight = sparse(*shape, seed=0, dtype=BF16)
    packed = pack24(weight)
    assert torch.equal(ops.unpack_stored(*packed), weight)
    assert torch.equal(ops.unpack_fragments(to_fragments(*packed), *shape), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "split", "dtype"), [(3, 1, FP16), (17, 2, BF16)])
def test_stored(device, rows, shape, dtype, split):
    run_stored(rows, shape, dtype, split)


@pytest.mark.parametrize("shape", [(100, 132), (64, 256)])  # the second by asynchronous copies
@pytest.mark.parametrize(("rows", "split", "dtype"), [(1, 1, BF16), (3, 2, FP16), (17, 3, BF16)])
def test_skinny(device, rows, shape, dtype, split):
    run_skinny(rows, shape, dtype, split)


@pytest.mark.parametrize("shape", [(100, 36, 132), (96, 64, 256)])
@pytest.mark.parametrize(("rows", "split", "dtype"), [(1, 1, BF16), (3, 2, FP16), (17, 3, BF16)])
def test_pivots(device, rows, shape, dtype, split):
    out, rank, columns = shape
    x, v, bias = problem(rows, (rank, columns), dtype)
    c = (torch.randn(out - rank, rank) / rank**0.5).to(dtype)
    bias = torch.randn(out).to(dtype)
    order = row_order(torch.randperm(out)[:rank].sort().values.int(), out)
    inner = (x.double() @ v.double().T).to(dtype)
    expected = torch.empty(rows, out, dtype=torch.float64)
    expected[:, order] = torch.cat([inner.double(), inner.double() @ c.double().T], 1)
    semaphore, config = ops.new_semaphore(out, "cpu"), {**SKINNY, "split": split}
    y = scatter(inner, c, order, bias, semaphore, config)
    assert_close(y, expected + bias.double())
    assert_close(pivot(x, v, c, order, None, semaphore), expected)
    assert not semaphore.any()


@pytest.mark.parametrize(
    ("shape", "stack", "split", "rows", "dtype"),
    [
        ((64, 128, 16, 32), 2, 1, 1, BF16),  # several blocks of A in a program
        ((256, 192, 128, 64), 1, 3, 3, FP16),  # several programs for a block of A
        ((96, 64, 32, 64), 2, 2, 17, BF16),  # a last program that is not full
    ],
)
def test_armor(device, shape, stack, split, rows, dtype):
    run_armor(rows, shape, dtype, stack=stack, split=split, pdl=device.target == 90)
    assert len(device.launches) == 2


@pytest.mark.parametrize(("device", "rows"), [(80, 2), (90, 20)], indirect=["device"])
def test_as_the_rule_chooses(device, rows):
    """The public functions, with the settings that a model gets."""
    x, weight, bias = problem(rows, (160, 256), BF16)
    packed = pack24(weight)
    check(x, weight, bias, lambda semaphore: ops.sparse24(x, *packed, bias, semaphore))
    check(
        x,
        weight,
        bias,
        lambda semaphore: ops.sparse24_fragments(
            x, to_fragments(*packed), len(weight), bias, semaphore
        ),
    )
    u, v = torch.randn(160, 48).to(BF16) / 7, torch.randn(48, 256).to(BF16) / 16
    y = lowrank_ops.lowrank(x, u, v, bias, ops.new_semaphore(160, "cpu"))
    assert_close(y, x.double() @ v.double().T @ u.double().T + bias.double())
    x, core, a, b, bias, expected = armor_problem(rows, 256, 256, 128, 128, BF16)
    semaphore = ops.new_semaphore(256, "cpu")
    assert_close(armor_ops.armor(x, to_fragments(*pack24(core)), a, b, bias, semaphore), expected)
    assert not semaphore.any()
    assert [launch.name for launch in device.launches].count("product") == 5


def test_the_check_at_load_time(device):
    assert probe.fragments_are_right(torch.device("cpu"))
    device.edit = lambda text: text.replace("0x1;", "0x0;")  # the metadata of the other step
    assert not probe.fragments_are_right(torch.device("cpu"))


def test_what_was_compiled_ahead_is_launched(device, monkeypatch):
    made, plain = [], CUDABackend.make_cubin
    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *args: made.append(args) or plain(*args))
    x, weight, bias = problem(5, (48, 64), BF16)
    fragments, semaphore = to_fragments(*pack24(weight)), ops.new_semaphore(48, "cpu")
    config = {**MMA, "warps": 2, "split": 2, "ordered": True}
    run = partial(ops.run_fragments, x, fragments, 48, bias, semaphore, config)
    compile_ahead(
        [run, partial(ops.run_fragments, x, fragments, 48, bias, semaphore, {"kernel": "none"})]
    )
    assert made
    assert not device.launches
    made.clear()
    assert_close(run(), x.double() @ weight.double().T + bias.double())
    assert not made
    assert len(device.launches) == 2


def split_mma(device):
    return run_mma(3, (128, 192), BF16, **STACKED, pdl=device.target == 90)


def split_armor(device):
    return run_armor(3, (256, 192, 128, 64), FP16, stack=1, split=3, pdl=device.target == 90)


@pytest.mark.parametrize("run", [split_mma, split_armor])
def test_the_order_of_the_programs_does_not_matter(device, run):
    results = []
    for device.seed in range(3):
        results.append(run(device))
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("rows", [1, 16])
def test_the_weight_is_read_once_and_coalesced(device, rows):
    x, weight, _ = problem(rows, (128, 256), BF16)
    fragments = to_fragments(*pack24(weight))
    ops.run_fragments(x, fragments, 128, None, ops.new_semaphore(128, "cpu"), {**MMA, "split": 2})
    read = device.launches[-1].traffic
    for name, tensor in (("v_ptr", fragments.values), ("m_ptr", fragments.words)):
        assert read[name] == (tensor.nbytes // 32, tensor.nbytes // 32)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_shared_memory_without_bank_conflicts(device, rows):
    """With the arrangement for a large weight, whose warps share out K."""
    x, weight, bias = problem(rows, (128, 256), BF16)
    config = {**kernel_config.rule("fragments", 4096, 4096, rows, 132), "split": 2}
    check(
        x,
        weight,
        bias,
        lambda semaphore: ops.run_fragments(
            x, to_fragments(*pack24(weight)), 128, bias, semaphore, config
        ),
    )
    requests, cycles = device.launches[-1].shared
    assert 0 < requests == cycles


# What would go wrong if the code were a little different: each edit of the PTX must be noticed.

SPLIT = [
    (
        r"(bar\.sync 0;\n)+(?=[^@]*@\S+ atom)",
        "",
    ),  # the stores of other threads are not ordered before the atomic
    (r"acq_rel", "relaxed"),
    (r"acq_rel", "acquire"),
    (r"acq_rel", "release"),
    (
        r"(@\S+ st\.shared[^;]*;\n)bar\.sync 0;",
        r"\1",
    ),  # the others read what the atomic gave before it is there
    (
        r"(ld\.shared\.b32 %r\d+, \[global_smem\];\n[^@]*setp)\.ne",
        r"\1.eq",
    ),  # all go on but the last
]
MMA_SP = [
    (r"0x1;", "0x0;"),  # the metadata of the other step
    (r"(mma\.sp.*\{)(%r\d+),(%r\d+),(.*0x0;)", r"\1\3,\2,\4"),
]
ASYNC = [
    (r"cp\.async\.wait_group \d+;", ""),
    (r"(cp\.async\.wait_group \d+;\n)bar\.sync 0;", r"\1"),
]
WARP_GROUP = [(r"fence\.proxy\.async\S*;", ""), (r"wgmma\.wait_group\S* 0;", "")]


def broken(device, pattern, replacement, run):
    """A run must go wrong once the pattern, which occurs, is replaced."""
    run()
    found = []

    def edit(text):
        edited, count = re.subn(pattern, replacement, text)
        found.append(count)
        return edited

    device.edit, noticed = edit, None
    try:
        run()
    except AssertionError as error:
        noticed = error
        print(error)  # pytest -rP shows it
    assert any(found), "the code has no such place"
    assert noticed


@pytest.mark.parametrize("device", [80], indirect=True)
@pytest.mark.parametrize(("pattern", "replacement"), [*SPLIT, *MMA_SP])
def test_a_broken_mma_is_noticed(device, pattern, replacement):
    broken(device, pattern, replacement, lambda: split_mma(device))


@pytest.mark.parametrize("device", [90], indirect=True)
@pytest.mark.parametrize(("pattern", "replacement"), SPLIT)
def test_a_broken_armor_is_noticed(device, pattern, replacement):
    broken(device, pattern, replacement, lambda: split_armor(device))


@pytest.mark.parametrize(("pattern", "replacement"), ASYNC)
def test_a_broken_pipeline_is_noticed(device, pattern, replacement):
    broken(device, pattern, replacement, lambda: run_skinny(1, (64, 256), BF16, 1))


@pytest.mark.parametrize(("pattern", "replacement"), WARP_GROUP)
def test_a_broken_product_of_a_warp_group_is_noticed(pattern, replacement, folder):
    with emulated(Device(90), folder) as device:
        broken(device, pattern, replacement, lambda: split_armor(device))


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"griddepcontrol\.wait ?;", ""),
        (r"(griddepcontrol\.wait ?;)([\s\S]*?\n)(?=.*st\.global)", r"\2\1"),
    ],  # never; too late
)
def test_a_launch_that_does_not_wait_is_noticed(pattern, replacement, folder):
    with emulated(Device(90), folder) as device:
        broken(device, pattern, replacement, lambda: split_armor(device))

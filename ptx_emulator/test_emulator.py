"""The emulator itself: instructions against literal Python, and every check with
something that it must find.
"""

import os

import numpy as np
import pytest
import torch

from ptx_emulator import ptx, tensor_cores
from ptx_emulator.arithmetic import operation, to_bf16
from ptx_emulator.instructions import decode
from ptx_emulator.machine import execute
from ptx_emulator.memory import Memory, Region

MODULE = """
.version 8.8
.target sm_80
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 in,
    .param .u64 .ptr .global .align 1 out
)
.reqntid %d
{
    .reg .pred %%p<9>;
    .reg .b16 %%rs<9>;
    .reg .b32 %%r<9>;
    .reg .b64 %%rd<9>;
    mov.u32 %%r0, %%tid.x;
    ld.param.b64 %%rd0, [in];
    mad.wide.u32 %%rd1, %%r0, 16, %%rd0;
    ld.param.b64 %%rd2, [out];
    mad.wide.u32 %%rd2, %%r0, 8, %%rd2;
    ld.global.v4.b32 {%%r1, %%r2, %%r3, %%r4}, [%%rd1];
    mov.b64 %%rd5, 0;
%s
    st.global.b64 [%%rd2], %%rd5;
    ret;
}
"""
WIDEN = "\n    cvt.u64.u32 %rd5, %r5;"


def run(body, inputs=None, threads=32, shared=64, grid=(1, 1, 1), seed=0):
    """Each thread gets its four words of `inputs` in %r1 … %r4 and gives back %rd5."""
    inputs = np.zeros((threads, 4), np.uint32) if inputs is None else inputs
    outputs = np.full(threads, -1, np.int64).view(np.uint64)
    regions = [
        Region(
            name,
            array.ctypes.data,
            array.ctypes.data + array.nbytes,
            array.view(np.uint8).reshape(-1),
        )
        for name, array in (("in", inputs), ("out", outputs))
    ]
    kernel = ptx.parse(ptx.plain(MODULE % (threads, body)))
    execute(
        kernel,
        decode(kernel),
        grid,
        [region.start for region in regions],
        Memory(regions),
        shared,
        seed,
    )
    return outputs


def signed(x, bits=32):
    x &= (1 << bits) - 1
    return x - (x >> bits - 1 << bits)


def byte_permute(a, b, selector):
    both, result = a | b << 32, 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = both >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte >> 7 else 0
        result |= byte << 8 * place
    return result


def bit_field(a, start, length, sign):
    """As the PTX ISA has it, bit by bit."""
    filler = a >> min(start + length - 1, 31) & 1 if sign and length else 0
    return sum(
        (a >> start + place & 1 if place < length and start + place < 32 else filler) << place
        for place in range(32)
    )


def truncated(a, b):
    a, b = signed(a), signed(b)
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else 0


INSTRUCTIONS = {
    "add.s32 %r5, %r1, %r2": lambda a, b, c, d: a + b,
    "sub.u32 %r5, %r1, %r2": lambda a, b, c, d: a - b,
    "mul.lo.s32 %r5, %r1, %r2": lambda a, b, c, d: a * b,
    "mul.hi.s32 %r5, %r1, 1431655766": lambda a, b, c, d: signed(a) * 1431655766 >> 32,
    "mul.hi.u32 %r5, %r1, %r2": lambda a, b, c, d: a * b >> 32,
    "mad.lo.u32 %r5, %r1, 0x22, 0x1010": lambda a, b, c, d: a * 0x22 + 0x1010,
    "min.s32 %r5, %r1, -5": lambda a, b, c, d: min(signed(a), -5),
    "max.u32 %r5, %r1, %r2": lambda a, b, c, d: max(a, b),
    "div.s32 %r5, %r1, %r3": lambda a, b, c, d: truncated(a, c),
    "rem.s32 %r5, %r1, %r3": lambda a, b, c, d: signed(a) - truncated(a, c) * signed(c),
    "neg.s32 %r5, %r1": lambda a, b, c, d: -a,
    "and.b32 %r5, %r1, -65536": lambda a, b, c, d: a & 0xFFFF0000,
    "xor.b32 %r5, %r1, %r2": lambda a, b, c, d: a ^ b,
    "shl.b32 %r5, %r1, %r4": lambda a, b, c, d: a << d if d < 32 else 0,
    "shr.u32 %r5, %r1, %r4": lambda a, b, c, d: a >> d if d < 32 else 0,
    "shr.s32 %r5, %r1, %r4": lambda a, b, c, d: signed(a) >> min(d, 31),
    "bfe.u32 %r5, %r1, %r4, 7": lambda a, b, c, d: bit_field(a, d, 7, False),
    "bfe.s32 %r5, %r1, %r4, 7": lambda a, b, c, d: bit_field(a, d, 7, True),
    "bfe.s32 %r5, %r1, 3, %r4": lambda a, b, c, d: bit_field(a, 3, d, True),
    "prmt.b32 %r5, %r1, %r2, %r3": lambda a, b, c, d: byte_permute(a, b, c),
    "lop3.b32 %r5, %r1, %r2, %r3, 0xCA": lambda a, b, c, d: a & b | ~a & c,
    "mul.wide.s32 %rd5, %r1, %r2": lambda a, b, c, d: signed(a) * signed(b),
    "mad.wide.u32 %rd5, %r1, %r2, %rd5": lambda a, b, c, d: a * b,
    "cvt.s64.s32 %rd5, %r1": lambda a, b, c, d: signed(a),
    "{ .reg .b16 h; cvt.u16.u32 h, %r1; cvt.s32.s16 %r5, h; }": lambda a, b, c, d: signed(a, 16),
    "cvt.s8.s32 %rs1, %r1; cvt.s16.s8 %rs2, %rs1; mov.b32 %r5, {%rs2, %rs1}": lambda a, b, c, d: (
        (signed(a, 8) & 0xFFFF) * 0x10001
    ),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r5, {%rs2, %rs1}": lambda a, b, c, d: a >> 16 | a << 16,
    "mov.b64 %rd5, {%r1, %r2}": lambda a, b, c, d: a | b << 32,
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r5, %r3, %r4, %p1": lambda a, b, c, d: (
        c if signed(a) < signed(b) else d
    ),
    "setp.gt.u32 %p1, %r1, %r2; mov.b32 %r5, 7; @!%p1 mov.b32 %r5, %r3": lambda a, b, c, d: (
        7 if a > b else c
    ),
    "add.s16x2 %r5, %r1, %r2": lambda a, b, c, d: (
        (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16
    ),
}
WORDS = [
    0,
    1,
    2,
    3,
    31,
    32,
    33,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x12345678,
    0xBA987654,
]


@pytest.mark.parametrize("line", INSTRUCTIONS)
def test_an_instruction(line):
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 1 << 32, (256, 4), dtype=np.uint32)
    inputs[:128] = generator.choice(np.array(WORDS, np.uint32), (128, 4))
    inputs[:, 2] |= inputs[:, 2] == 0  # a divisor
    inputs[:, 3] %= 40  # a shift
    wide = "%rd5" in line
    found = run(f"{line};" + ("" if wide else WIDEN), inputs, threads=256)
    mask = (1 << 64 if wide else 1 << 32) - 1
    assert [int(value) for value in found] == [
        INSTRUCTIONS[line](*map(int, row)) & mask for row in inputs
    ]


def test_floats():
    values = torch.cat(
        (
            torch.randn(1000),
            torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -0.0, float("inf"), 1e-40]),
        )
    )
    assert torch.equal(
        torch.from_numpy(to_bf16(values.numpy()).view(np.int16)),
        values.bfloat16().view(torch.int16),
    )
    inputs = np.array([[1.5, 2.25, -3.0, 0.1]] * 32, np.float32).view(np.uint32)
    added = run("fma.rn.f32 %r5, %r1, %r2, %r3;" + WIDEN, inputs)
    assert added.astype(np.uint32).view(np.float32)[0] == 1.5 * 2.25 - 3
    packed = (
        run("cvt.rn.f16x2.f32 %r5, %r1, %r2;" + WIDEN, inputs).astype(np.uint32).view(np.float16)
    )
    assert packed[:2].tolist() == [2.25, 1.5]  # the first operand is the upper half


def test_sums_of_bfloat16_are_rounded_once():
    values = torch.randn(3, 4096) * torch.tensor([[1.0], [1.0], [2.0**-7]])
    a, b, c = values.bfloat16()
    bits = [part.view(torch.int16).numpy().view(np.uint16) for part in (a, b, c)]
    for name, operands, expected in (
        ("add", bits[:2], (a.double() + b.double()).bfloat16()),
        ("add", bits[1:], (b.double() + c.double()).bfloat16()),
        ("fma", bits, (a.double() * b.double() + c.double()).bfloat16()),
    ):
        _, _, function = operation([name, "rn", "bf16"])
        found = torch.from_numpy(function(*operands).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(found, expected)


def test_a_register_that_nobody_wrote_is_nan():
    assert np.isnan(run("add.f32 %r5, %r8, %r1;" + WIDEN).astype(np.uint32).view(np.float32)).all()


def test_a_shuffle():
    inputs = np.arange(256, dtype=np.uint32).reshape(64, 4)
    found = run("shfl.sync.bfly.b32 %r5, %r1, 2, 31, -1;" + WIDEN, inputs, threads=64)
    assert found.tolist() == [4 * (thread ^ 2) for thread in range(64)]


def test_threads_part_and_come_together():
    body = """
    mov.b32 %r5, 0;
    setp.eq.s32 %p1, %r0, 7;
    @%p1 bra DONE;
    LOOP:
    setp.ge.s32 %p2, %r5, %r0;
    @%p2 bra DONE;
    add.s32 %r5, %r5, 1;
    bra.uni LOOP;
    DONE:
    bar.sync 0;
    """
    assert run(body + WIDEN).tolist() == [0 if thread == 7 else thread for thread in range(32)]
    with pytest.raises(AssertionError, match="not all threads take part"):
        run(body.replace("bra.uni", "bar.sync 0; bra.uni"))


TO_SHARED = (
    "shl.b32 %r6, %r0, 2; mov.b32 %r7, smem; add.s32 %r6, %r6, %r7; st.shared.b32 [%r6], %r0;\n"
)
AGAIN = "xor.b32 %r6, %r6, 128; st.shared.b32 [%r6], 7;"
FROM_OTHER = "xor.b32 %r6, %r6, 128; ld.shared.b32 %r5, [%r6];"  # what the other warp stored


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "ld.global.b32 %r5, [%rd1+512]",
            "out of bounds: thread 32, 4 bytes at in [+] 1024 of 1024",
        ),
        ("add.s64 %rd1, %rd1, 2; ld.global.b32 %r5, [%rd1]", "not a multiple of 4"),
        ("ld.shared.b32 %r5, [smem+256]", "shared memory has 256 bytes"),
        ("ld.shared.b32 %r5, [smem]", "before anything was written"),
        (TO_SHARED + FROM_OTHER, "race: read where another warp writes"),
        (
            TO_SHARED + "xor.b32 %r6, %r6, 128; st.shared.b32 [%r6], %r0",
            "race: written where another warp writes",
        ),
        (TO_SHARED + "bar.sync 0;" + FROM_OTHER + AGAIN, "race: written where another warp reads"),
        ("st.shared.b32 [smem], %r0", "different values at one place"),
        ("st.global.b32 [%rd0], %r0", "different values at one place"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 bar.sync 0", "not all threads"),
        ("sin.approx.f32 %r5, %r1", "does not know this instruction"),
    ],
)
def test_what_must_be_found(body, message):
    with pytest.raises(AssertionError, match=message):
        run(body + ";", threads=64, shared=256)


def test_the_same_with_barriers_is_right():
    found = run(
        TO_SHARED + "bar.sync 0;" + FROM_OTHER + "bar.sync 0;" + AGAIN + WIDEN,
        threads=64,
        shared=256,
    )
    assert found.tolist() == [thread ^ 32 for thread in range(64)]


def test_copies_arrive_when_they_are_waited_for():
    start = (
        "shl.b32 %r6, %r0, 2; mov.b32 %r7, smem; add.s32 %r6, %r6, %r7; st.shared.b32 [%r6], 5; "
        "mov.b32 %r8, 4;\n"
    )
    copy = (
        start
        + "cp.async.ca.shared.global [ %r6 + 0 ], [ %rd1 + 0 ], 0x4, %r8; cp.async.commit_group;\n"
    )
    inputs = np.arange(128, dtype=np.uint32).reshape(32, 4)
    read = "ld.shared.b32 %r5, [%r6];" + WIDEN
    assert run(copy + read, inputs, shared=128).tolist() == [5] * 32
    assert run(copy + "cp.async.wait_group 1;" + read, inputs, shared=128).tolist() == [5] * 32
    assert (
        run(copy + "cp.async.wait_group 0;" + read, inputs, shared=128).tolist()
        == inputs[:, 0].tolist()
    )
    nothing = copy.replace("%r8, 4", "%r8, 0") + "cp.async.wait_group 0;" + read
    assert run(nothing, inputs, shared=128).tolist() == [0] * 32


HANDED_ON = """
    mov.u32 %r6, %ctaid.x;
    setp.eq.s32 %p1, %r6, 0;
    setp.ne.s32 %p2, %r0, 0;
    mov.b64 %rd5, 1;
    @!%p1 bra TAKE;
    st.global.b32 [%rd1], 42;
    bar.sync 0;
    @!%p2 atom.global.gpu.ORDER.add.u32 %r7, [%rd3], 1;
    ret;
    TAKE:
    mov.b32 %r7, 1;
    @!%p2 atom.global.gpu.ORDER.add.u32 %r7, [%rd3], 0;
    setp.eq.s32 %p3, %r7, 0;
    @%p3 bra TAKE;
    bar.sync 0;
    ld.global.b32 %r5, [%rd1];
"""


@pytest.mark.parametrize(
    ("order", "barriers", "seen"),
    [
        ("acq_rel", 3, 42),
        ("relaxed", 3, 0),
        ("release", 3, 0),
        ("acquire", 3, 0),
        ("acq_rel", 0, 0),
    ],
)
def test_what_another_program_sees(order, barriers, seen):
    """The second program waits for the first and reads what it stored: only with both halves of the
    order, and barriers.
    """
    body = "add.s64 %rd3, %rd0, 8;" + HANDED_ON.replace("ORDER", order) + WIDEN
    if not barriers:
        body = body.replace("bar.sync 0;", "")
    for seed in range(4):
        found = run(body, np.zeros((64, 4), np.uint32), threads=64, grid=(2, 1, 1), seed=seed)
        assert (found[1:] == seen).all()


def literal(left, right, acc, rows, columns, k):
    return [
        [acc[i][j] + sum(left[i][t] * right[t][j] for t in range(k)) for j in range(columns)]
        for i in range(rows)
    ]


def test_mma():
    """The tables of mma.m16n8k16, written out lane by lane."""
    generator = np.random.default_rng(0)
    left, right = (
        generator.integers(-8, 8, shape).astype(np.float16) for shape in ((16, 16), (16, 8))
    )
    acc = generator.integers(-8, 8, (16, 8)).astype(np.float32)
    a, b, c = (
        np.zeros((32, 4, 2), np.float16),
        np.zeros((32, 2, 2), np.float16),
        np.zeros((32, 4), np.float32),
    )
    expected = np.zeros_like(c)
    product = literal(left.tolist(), right.tolist(), acc.tolist(), 16, 8, 16)
    for lane in range(32):
        gid, tig = lane // 4, lane % 4
        for i in range(8):
            row = gid if i in (0, 1, 4, 5) else gid + 8
            a[lane, i // 2, i % 2] = left[row, 2 * tig + i % 2 + (0 if i < 4 else 8)]
        for i in range(4):
            b[lane, i // 2, i % 2] = right[2 * tig + i % 2 + (0 if i < 2 else 8), gid]
            row, column = gid if i < 2 else gid + 8, 2 * tig + i % 2
            c[lane, i], expected[lane, i] = acc[row, column], product[row][column]
    found = tensor_cores.mma(a.view(np.uint32)[..., 0], b.view(np.uint32)[..., 0], c, bf16=False)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_come_back_as_they_went(count, transposed):
    rows = np.random.default_rng(0).integers(0, 256, (64, 16), dtype=np.uint8)
    held = tensor_cores.ldmatrix(rows, count, transposed)
    lane, halves = 13, rows.view(np.uint16)  # lane 13 holds row 3, columns 2 and 3
    low, high = (halves[2, 3], halves[3, 3]) if transposed else (halves[3, 2], halves[3, 3])
    assert held[lane, 0] == int(low) | int(high) << 16
    back = tensor_cores.stmatrix(held, transposed).reshape(2, 32, 16)[:, : 8 * count]
    assert np.array_equal(back, rows.reshape(2, 32, 16)[:, : 8 * count])


def test_an_access_that_no_mask_stops(tmp_path):
    """Through all of Triton: a kernel whose last program reads behind its argument."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from ptx_emulator.launch import Device, emulated
    from ptx_emulator.samples import copy

    x = torch.randn(100)
    with emulated(Device(80), tmp_path) as device:
        y = torch.empty(100)
        copy[(triton.cdiv(100, 32),)](x, y, 100, BLOCK=32, MASKED=True, num_warps=1)
        assert torch.equal(x, y)
        assert device.launches[-1].traffic["x_ptr"] == (13, 13)
        with pytest.raises(
            AssertionError, match=r"ld\.global.*\n.*out of bounds.* at x_ptr \+ 400 of 400"
        ):
            copy[(triton.cdiv(100, 32),)](x, y, 100, BLOCK=32, MASKED=False, num_warps=1)

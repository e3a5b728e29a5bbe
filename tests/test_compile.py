"""Every kernel compiled for three GPUs, without one: registers, instructions and loads as the
design needs them.
"""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from compressor_kernels import decompress, fused_armor, gemv, mma, skinny  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = [80, 89, 90]
NEEDED = {
    80: 14 << 10,
    89: 6 << 10,
    90: 26 << 10,
}  # bytes: bandwidth · 750 ns / multiprocessors of an A100, an L40S, an H200
BF16 = dict.fromkeys(("bias_ptr", "y_ptr", "a_ptr", "b_ptr"), "*bf16")
X16 = {**BF16, "x_ptr": "*bf16", "w_ptr": "*bf16", "o_ptr": "*bf16", "m_ptr": "*i16"}
ARRANGED = dict(WARPS=8, STACK=1, ROWS=1, UNROLL=1, PARTS=4, BF16=True, BIAS=True, PDL=False)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function: kernel, pointer types, constants, target -> registers, spills, shared memory,
    machine code, Triton's layouts.
    """
    folder = tmp_path_factory.mktemp("cubin")

    def build(kernel, types, constants, target, num_warps, num_stages=3):
        names = kernel.arg_names
        kinds = {
            n: types.get(n, "*fp32" if n == "part_ptr" else "*i32" if n.endswith("_ptr") else "i32")
            for n in names
        }
        aligned = [
            n for n in names if n not in constants and (n.endswith("_ptr") or n in ("N", "K"))
        ]
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else kinds[n] for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        made = triton.compile(
            source,
            target=GPUTarget("cuda", target, 32),
            options=dict(num_warps=num_warps, num_stages=num_stages),
        )
        path = folder / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage = subprocess.run(
            [BINARIES / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [BINARIES / "nvdisasm", "-c", path], capture_output=True, text=True, check=True
        ).stdout
        registers, stack, local = map(
            int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        )
        return SimpleNamespace(
            registers=registers,
            spilled=stack + local,
            shared=made.metadata.shared,
            code=listing,
            operations=operations(listing),
            ttgir=made.asm["ttgir"],
        )

    return build


def operations(listing):
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing)


def loop(listing, holding):
    """The lines between a label and the last jump back to it, of the smallest such loop with an
    instruction like `holding`.
    """
    lines = listing.splitlines()
    labels = {
        match[1]: place
        for place, line in enumerate(lines)
        if (match := re.match(r"\s*(\.L_\w+):", line))
    }
    jumps = [
        (labels[match[1]], place)
        for place, line in enumerate(lines)
        if (match := re.search(r"BRA.*`\((\.L_\w+)\)", line))
    ]
    loops = ["\n".join(lines[start : end + 1]) for start, end in jumps if start < end]
    return min(
        (body for body in loops if any(holding in name for name in operations(body))), key=len
    )


def per_weight(body, warps, weights):
    value = len(operations(body)) * 32 * warps / weights
    print(f"{value:.2f} instructions in the loop for each weight")  # pytest -rP shows it
    return value


def under_way(made, warps, turns=6):
    """Bytes of weights that a full multiprocessor has on the way, on average, if a load of weights
    takes a time of 1, one of x, which comes from a cache, 0.3, and all else none: from the order in
    which the loop has loads and what needs them.
    """
    body, now, ready, marks, loads = loop(made.code, "HMMA.SP"), 0.0, {}, [], 0
    for line in turns * body.splitlines():
        load = re.search(r"LDG\S*?(\.EF)?(?:\.(128|64))? R(\d+), desc", line)
        needed = [int(name) for name in re.findall(r"\bR(\d+)\b", line)]
        if "HMMA" in line:
            needed = [first + i for first in needed for i in range(4)]
        if load:
            needed.remove(int(load[3]))
        now = max([now, *(ready.pop(name) for name in needed if name in ready)])
        if load:
            loads += load[2] == "128" and bool(load[1])
            ready.update(
                (int(load[3]) + i, now + (1 if load[1] else 0.3))
                for i in range(int(load[2] or 32) // 32)
            )
        if "BRA" in line:
            marks.append((now, loads))
    (begun, before), (ended, after) = marks[1], marks[-1]
    resident = min(65536 // (-(-made.registers // 8) * 8 * 32 * warps), 64 // warps) * warps
    return resident * 576 * (after - before) / (ended - begun)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("arrangement", "tiles", "ordered", "registers", "instructions"),
    [
        (dict(STACK=1, ROWS=1), 1, False, 64, 2.0),
        (dict(STACK=1, ROWS=2), 1, False, 80, 1.5),
        (dict(STACK=2, ROWS=2), 1, False, 80, 1.5),
        (dict(STACK=4, ROWS=2), 2, False, 96, 2.0),
        (dict(STACK=4, ROWS=2), 8, True, 200, 2.5),
    ],
    ids=["1 row", "4 rows", "8 rows", "16 rows", "64 rows"],
)
def test_mma(compiled, target, arrangement, tiles, ordered, registers, instructions):
    constants = {**ARRANGED, **arrangement}
    batch, lanes = 2 * constants["ROWS"], 32 * constants["STACK"] * constants["ROWS"] * tiles
    made = compiled(
        mma.product,
        BF16,
        dict(constants, TILES=tiles, ORDERED=ordered, EVEN=True, SIZE=lanes),
        target,
        8,
    )
    assert not made.spilled
    assert made.registers <= registers
    body = loop(made.code, "HMMA.SP.16832.F32.BF16")
    names = operations(body)
    assert sum("HMMA.SP" in name for name in names) == 2 * batch * tiles
    assert sum(name.startswith("LDG") and ".128" in name for name in names) == 2 * (
        batch + 2 * tiles * ordered
    )
    assert not any(name.startswith(("LDS", "STS", "SHFL", "BAR")) for name in names)
    assert per_weight(body, 8, batch * 8 * 16 * 64) <= instructions
    ahead = under_way(made, 8)
    print(f"{ahead / 1024:.0f} KB of weights under way in a multiprocessor")
    assert ahead >= NEEDED[target]
    check_operands(made.ttgir)


def check_operands(ttgir, warps=8):
    """Every mma.sp sees the layout it was written for: thread t holds row t, all four elements, in
    order.
    """
    used = re.findall(
        rf"elementwise_inline_asm \"mma\.sp.*-> tensor<{32 * warps}x4xf32, (#\w+)>", ttgir
    )
    assert used
    for name in set(used):
        layout = re.search(rf"^{name} = (.*)$", ttgir, re.MULTILINE)[1]
        assert re.search(
            rf"sizePerThread = \[1, [14]\], threadsPerWarp = \[32, 1\], warpsPerCTA = \[{warps}, "
            rf"1\]",
            layout,
        ), layout


@pytest.mark.parametrize("warps", [4, 8, 16])
@pytest.mark.parametrize(
    ("stack", "row_tiles"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4)]
)
def test_operands_of_every_arrangement(compiled, warps, stack, row_tiles):
    """Those that the rule or the tuning may take."""
    constants = dict(
        ARRANGED, WARPS=warps, STACK=stack, ROWS=row_tiles, SIZE=32 * stack * row_tiles
    )
    check_operands(
        compiled(
            mma.product, BF16, dict(constants, TILES=1, ORDERED=False, EVEN=True), 90, warps
        ).ttgir,
        warps,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_mma_in_float16_with_a_last_tile_that_is_not_full(compiled, target):
    constants = dict(
        ARRANGED, TILES=2, ORDERED=False, EVEN=False, BF16=False, PDL=target == 90, SIZE=64
    )
    made = compiled(mma.product, dict.fromkeys(BF16, "*fp16"), constants, target, 8)
    assert not made.spilled
    assert "HMMA.SP.16832.F32 " in made.code
    check_operands(made.ttgir)
    assert ("ACQBULK" in made.code) == (
        target == 90
    )  # waits for the launch before it only where that is asked for


@pytest.mark.parametrize("target", TARGETS)
def test_armor(compiled, target):
    shared = dict(TILES=1, BM=16, SIZE=128, WIDE=False, PDL=target == 90)
    constants = dict(ARRANGED, STACK=4, ROWS=2, PIECE=128 if target == 90 else 16, **shared)
    made = compiled(fused_armor.product, BF16, constants, target, 8, num_stages=1)
    assert made.spilled <= (
        0 if target == 90 else 16
    )  # what lets another program run is worth it at the very end
    assert not any(
        name.startswith(("LDL", "STL")) for name in operations(loop(made.code, "HMMA.SP"))
    )
    assert made.registers <= 112  # two programs a multiprocessor
    assert (
        made.shared <= 44 << 10
    )  # what was loaded ahead would not leave room for several programs
    assert sum("HMMA.SP" in name for name in operations(loop(made.code, "HMMA.SP"))) == 8
    assert under_way(made, 8) >= NEEDED[target]
    check_operands(made.ttgir)
    assert ("ACQBULK" in made.code) == (target == 90)
    made = compiled(fused_armor.apply_b, X16, dict(ROWS=32, **shared), target, 4)
    assert not made.spilled
    assert "HMMA.16816" in made.code


@pytest.mark.parametrize("target", TARGETS)
def test_gemv(compiled, target):
    made = compiled(gemv.product, BF16, dict(WARPS=4, PARTS=4, BF16=True, BIAS=True), target, 4)
    assert not made.spilled
    body = loop(made.code, "PRMT")
    assert sum(name.startswith("LDG") and ".128" in name for name in operations(body)) == 2
    assert not any(name.startswith(("LDS", "STS")) for name in operations(body))
    assert per_weight(body, 4, 4 * 16 * 64) <= 7.0


@pytest.mark.parametrize("target", TARGETS)
def test_dot(compiled, target):
    shared = dict(BM=16, BN=32, BK=128, PARTS=4, BIAS=True, WIDE=False)
    made = compiled(
        decompress.product, X16 | {"v_ptr": "*i32"}, dict(ASM=True, **shared), target, 2
    )
    assert not made.spilled
    body = loop(made.code, "MMA")
    assert any("PRMT" in name for name in operations(body))
    assert per_weight(body, 2, 32 * 128) <= 8.0
    made = compiled(skinny.product, X16, shared, target, 2)
    assert not made.spilled
    assert any(
        name.startswith("LDGSTS") and ".128" in name for name in operations(loop(made.code, "MMA"))
    )
    thin = {**BF16, "t_ptr": "*bf16", "c_ptr": "*bf16", "rows_ptr": "*i64"}
    made = compiled(skinny.scattered, thin, shared, target, 2)
    assert not made.spilled
    assert any(
        name.startswith("LDGSTS") and ".128" in name for name in operations(loop(made.code, "MMA"))
    )


@pytest.mark.parametrize("target", TARGETS)
def test_layouts(compiled, target):
    stored = compiled(
        decompress.unpack_stored, {"m_ptr": "*i16"}, dict(BN=16, BK=256, ASM=True), target, 4
    )
    fragments = compiled(decompress.unpack_fragments, {}, dict(ASM=True), target, 2)
    order = compiled(mma.order, {}, dict(TILES=2, PDL=False), target, 2)
    assert not any(made.spilled for made in (stored, fragments, order))
    assert any("STG.E.128" in name for name in stored.operations)
    assert any("LDG.E.128" in name for name in fragments.operations)

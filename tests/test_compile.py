"""Every kernel compiled for three GPUs, without one: registers, instructions and loads as the design needs them."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from compressor_kernels import expand, gemv, mma, skinny, wrapped  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = [80, 89, 90]
BF16 = dict.fromkeys(("bias_ptr", "y_ptr", "a_ptr", "b_ptr"), "*bf16")
X16 = {**BF16, "x_ptr": "*bf16", "w_ptr": "*bf16", "o_ptr": "*bf16", "m_ptr": "*i16"}
SPARSE = dict(WARPS=8, UNROLL=2, BF16=True, BIAS=True)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function: kernel, pointer types, constants, target -> registers, spills, machine instructions and the layouts of Triton."""
    folder = tmp_path_factory.mktemp("cubin")

    def build(kernel, types, constants, target, num_warps):
        names = kernel.arg_names
        kinds = {n: types.get(n, "*fp32" if n == "part_ptr" else "*i32" if n.endswith("_ptr") else "i32") for n in names}
        aligned = [n for n in names if n not in constants and (n.endswith("_ptr") or n in ("N", "K"))]
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else kinds[n] for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(num_warps=num_warps, num_stages=3))
        path = folder / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage = subprocess.run([BINARIES / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
        listing = subprocess.run([BINARIES / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
        return SimpleNamespace(
            registers=registers, spilled=stack + local, code=listing, operations=operations(listing), ttgir=made.asm["ttgir"]
        )

    return build


def operations(listing):
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing)


def loop(listing, holding):
    """The instructions between a label and the last jump back to it, of the smallest such loop that holds `holding`."""
    lines = listing.splitlines()
    labels = {match[1]: place for place, line in enumerate(lines) if (match := re.match(r"\s*(\.L_\w+):", line))}
    jumps = [(labels[match[1]], place) for place, line in enumerate(lines) if (match := re.search(r"BRA.*`\((\.L_\w+)\)", line))]
    loops = [operations("\n".join(lines[start : end + 1])) for start, end in jumps if start < end]
    return min((body for body in loops if any(holding in name for name in body)), key=len)


def per_weight(body, warps, weights):
    value = len(body) * 32 * warps / weights
    print(f"{value:.2f} instructions in the loop for each weight")  # pytest -rP shows it
    return value


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("tiles", "ordered", "registers", "bound"), [(1, False, 64, 1.6), (2, False, 64, 2.2), (8, True, 96, 2.8)])
def test_mma(compiled, target, tiles, ordered, registers, bound):
    made = compiled(mma.product, BF16, dict(TILES=tiles, ORDERED=ordered, EVEN=True, SPLIT=True, **SPARSE), target, 8)
    assert not made.spilled
    assert made.registers <= registers  # 64: four programs of 256 threads a multiprocessor
    body = loop(made.code, "HMMA.SP.16832.F32.BF16")
    assert sum("HMMA.SP" in name for name in body) == 2 * 2 * tiles
    assert sum(name.startswith("LDG") and ".128" in name for name in body) == 2 * 2 * (1 + tiles * ordered)
    assert not any(name.startswith(("LDS", "STS", "SHFL", "BAR")) for name in body)
    assert per_weight(body, 8, 2 * 8 * 16 * 64) <= bound
    check_operands(made.ttgir)


def check_operands(ttgir):
    """Every mma.sp sees the layout it was written for: thread t holds row t, all four elements, in order."""
    used = re.findall(r"elementwise_inline_asm \"mma\.sp.*-> tensor<256x4xf32, (#\w+)>", ttgir)
    assert used
    for name in set(used):
        layout = re.search(rf"^{name} = (.*)$", ttgir, re.MULTILINE)[1]
        assert re.search(r"sizePerThread = \[1, [14]\], threadsPerWarp = \[32, 1\], warpsPerCTA = \[8, 1\]", layout), layout


@pytest.mark.parametrize("target", TARGETS)
def test_mma_in_float16_with_a_last_tile_that_is_not_full(compiled, target):
    types = dict.fromkeys(BF16, "*fp16")
    made = compiled(mma.product, types, dict(SPARSE, TILES=2, ORDERED=False, EVEN=False, BF16=False, SPLIT=True), target, 8)
    assert not made.spilled
    assert "HMMA.SP.16832.F32 " in made.code
    check_operands(made.ttgir)


@pytest.mark.parametrize("target", TARGETS)
def test_armor(compiled, target):
    shared = dict(TILES=1, BM=16, SIZE=128, WIDE=False, PDL=target == 90)
    made = compiled(wrapped.product, BF16, dict(SPARSE, PART=64, **shared), target, 8)
    assert not made.spilled
    assert made.registers <= (80 if target == 90 else 128)  # three programs of 256 threads a multiprocessor; two
    assert sum("HMMA.SP" in name for name in loop(made.code, "HMMA.SP")) == 4
    check_operands(made.ttgir)
    assert ("ACQBULK" in made.code) == (target == 90)  # waits for the launch before it only where that is asked for
    made = compiled(wrapped.apply_b, X16, dict(ROWS=32, **shared), target, 4)
    assert not made.spilled
    assert "HMMA.16816" in made.code


@pytest.mark.parametrize("target", TARGETS)
def test_gemv(compiled, target):
    made = compiled(gemv.product, BF16, dict(WARPS=4, SPLIT=True, BF16=True, BIAS=True), target, 4)
    assert not made.spilled
    body = loop(made.code, "PRMT")
    assert sum(name.startswith("LDG") and ".128" in name for name in body) == 2
    assert not any(name.startswith(("LDS", "STS")) for name in body)
    assert per_weight(body, 4, 4 * 16 * 64) <= 6.5


@pytest.mark.parametrize("target", TARGETS)
def test_dot(compiled, target):
    shared = dict(BM=16, BN=64, BK=128, SPLIT=True, BIAS=True, WIDE=False)
    made = compiled(expand.product, X16 | {"v_ptr": "*i32"}, dict(ASM=True, **shared), target, 4)
    assert not made.spilled
    body = loop(made.code, "MMA")
    assert any("PRMT" in name for name in body)
    assert per_weight(body, 4, 64 * 128) <= 7.5
    made = compiled(skinny.product, X16, shared, target, 4)
    assert not made.spilled
    assert any(name.startswith("LDGSTS") and ".128" in name for name in loop(made.code, "MMA"))


@pytest.mark.parametrize("target", TARGETS)
def test_layouts(compiled, target):
    stored = compiled(expand.unpack_stored, {"m_ptr": "*i16"}, dict(BN=16, BK=256, ASM=True), target, 4)
    fragments = compiled(expand.unpack_fragments, {}, dict(ASM=True), target, 2)
    order = compiled(mma.order, {}, dict(TILES=2), target, 2)
    assert not any(made.spilled for made in (stored, fragments, order))
    assert any("STG.E.128" in name for name in stored.operations)
    assert any("LDG.E.128" in name for name in fragments.operations)

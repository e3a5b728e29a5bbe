"""Inline assembly in Triton's interpreter: the PTX of the kernels, run on numpy arrays.

`mma.sp` follows the fragment tables of the PTX ISA (sparse mma.m16n8k32, 16-bit types), lane by lane; the other strings are
run instruction by instruction on 32-bit integers.
"""

import re

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

LANE = np.arange(32)
GID, TIG = LANE // 4, LANE % 4


def floats(words, bf16):
    """uint32 [...] -> the two 16-bit floats in each, float32 [..., 2]."""
    halves = np.stack((words & 0xFFFF, words >> 16), -1)
    return (halves << 16).view(np.float32) if bf16 else halves.astype(np.uint16).view(np.float16).astype(np.float32)


def mma_sp(weight, x, word, acc, step, bf16):
    """Everything [32 · warps, 4], row t held by thread t; float32 sums."""
    warps = len(weight) // 32
    weight, x, word = (np.ascontiguousarray(part).view(np.uint32).reshape(warps, 32, 4) for part in (weight, x, word))
    assert (word == word[..., :1]).all(), "each lane has one word of metadata"
    left, right = np.zeros((warps, 16, 32), np.float32), np.zeros((warps, 32, 8), np.float32)
    pairs, columns = floats(weight, bf16), floats(x, bf16)
    for register in range(4):
        row, group = GID + 8 * (register % 2), TIG + 4 * (register // 2)
        held = word[:, 4 * GID + 2 * step + group // 4, 0] >> (16 * (register % 2))
        nibble = held >> (4 * (group % 4)).astype(np.uint32) & 15
        first, second = nibble & 3, nibble >> 2
        assert (first < second).all(), "ordered metadata"
        for warp in range(warps):
            left[warp, row, 4 * group + first[warp]] = pairs[warp, :, register, 0]
            left[warp, row, 4 * group + second[warp]] = pairs[warp, :, register, 1]
        for place in range(2):
            right[:, 2 * TIG + 8 * register + place, GID] = columns[:, :, register, place]
    product = left @ right
    out = np.array(acc, dtype=np.float32).reshape(warps, 32, 4)
    for register in range(4):
        out[:, :, register] += product[:, GID + 8 * (register // 2), 2 * TIG + register % 2]
    return out.reshape(-1, 4)


def prmt(a, b, selector):
    """Byte permute: each of four selector nibbles picks one of the eight bytes of b, a."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for byte in range(4):
        pick = (selector >> (4 * byte) & 7).astype(np.uint64) * np.uint64(8)
        result |= ((both >> pick & np.uint64(0xFF)) << np.uint64(8 * byte)).astype(np.uint32)
    return result


OPERATIONS = {
    "shl.b32": lambda a, b: np.where(b < 32, a << (b & 31), 0).astype(np.uint32),
    "shr.u32": lambda a, b: np.where(b < 32, a >> (b & 31), 0).astype(np.uint32),
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "add.u32": np.add,
    "sub.u32": np.subtract,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
    "mov.b32": lambda a: a,
}


def run(assembly, inputs, outputs):
    """Run straight-line PTX on uint32 arrays; `$0 …` are the outputs, then the inputs."""
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    shape = inputs[0].shape
    for line in assembly.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith((".reg", "bar.warp.sync", "prefetch")):  # none of them computes
            continue
        name, operands = line.strip().split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else np.full(shape, int(s, 0), np.uint32) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${place}"] for place in range(outputs)]


class _Result:
    def __init__(self, handles):
        self.handles = handles

    def get_result(self, place):
        return self.handles[place]


def create_inline_asm(self, assembly, constraints, handles, types, is_pure, pack):
    shape = np.broadcast_shapes(*(handle.data.shape for handle in handles))
    inputs = [np.ascontiguousarray(np.broadcast_to(handle.data, shape)) for handle in handles]
    if match := re.match(
        r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32 .*0x(\d);", assembly
    ):
        assert pack == 4
        assert shape[1] == 4
        result = mma_sp(*inputs, int(match[2]), match[1] == "bf16")
        return _Result([interpreter.TensorHandle(result, tl.float32)])
    assert pack == 1
    with np.errstate(over="ignore"):
        results = run(assembly, [part.astype(np.uint32) for part in inputs], constraints.count("="))
    return _Result([interpreter.TensorHandle(part.view(np.int32), tl.int32) for part in results])


def cast(self, source, target, plain=interpreter.InterpreterBuilder.cast_impl):
    """float32 to bfloat16 rounds to nearest, as on a GPU; the interpreter truncates."""
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
    return plain(self, source, target)


def install():
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    interpreter.InterpreterBuilder.cast_impl = cast

"""Inline assembly in Triton's interpreter: the PTX of the kernels, run on numpy arrays.

`mma.sp` is that of the emulator (ptx_emulator/tensor_cores.py), lane by lane; the other strings
are run instruction by instruction on unsigned 32-bit integers.
"""

import re

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from ptx_emulator.arithmetic import operation, to_bf16
from ptx_emulator.tensor_cores import mma_sp


def run(assembly, inputs, outputs):
    """Run straight-line PTX on uint32 arrays; `$0 …` are the outputs, then the inputs."""
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    shape = inputs[0].shape
    for line in assembly.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(
            (".reg", "bar.warp.sync", "prefetch")
        ):  # none of them computes
            continue
        name, operands = line.strip().split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [
            registers[s] if s in registers else np.full(shape, int(s, 0), np.uint32)
            for s in sources
        ]
        registers[target] = operation(name.split("."))[2](*values)
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
        r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32 "
        r".*0x(\d);",
        assembly,
    ):
        assert pack == 4
        assert shape[1] == 4
        weight, x, word, acc = inputs
        assert (word == word[:, :1]).all(), "each lane has one word of metadata"
        weight, x, word = (part.view(np.uint32) for part in (weight, x, word))
        result = mma_sp(weight, x, acc, word[:, 0], int(match[2]), match[1] == "bf16")
        return _Result([interpreter.TensorHandle(result, tl.float32)])
    assert pack == 1
    with np.errstate(over="ignore"):
        results = run(assembly, [part.astype(np.uint32) for part in inputs], constraints.count("="))
    return _Result([interpreter.TensorHandle(part.view(np.int32), tl.int32) for part in results])


def cast(self, source, target, plain=interpreter.InterpreterBuilder.cast_impl):
    """float32 to bfloat16 rounds to nearest, as on a GPU; the interpreter truncates."""
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return interpreter.TensorHandle(to_bf16(source.data), tl.bfloat16)
    return plain(self, source, target)


def install():
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    interpreter.InterpreterBuilder.cast_impl = cast

"""PTX instructions -> Python functions of a program: decoded once for a kernel, executed for all
threads at once.

A register is one array over the threads, of unsigned integers of its size or of bool; what an
instruction makes is a new array. An instruction that is not known is an AssertionError where it is
met.
"""

import re

import numpy as np

from ptx_emulator import arithmetic, tensor_cores
from ptx_emulator.ptx import TYPES, UNSIGNED, Address, number

NOTHING = {
    "griddepcontrol.launch_dependents",
    "bar.warp.sync",
    "wgmma.fence.sync.aligned",
    "prefetch",
    "createpolicy",
}
SPECIAL = {
    "%laneid",
    "%warpid",
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
}


def decode(kernel):
    """[(text, whether others may go on before it, step)]."""
    decoder, code = _Decoder(kernel), []
    for instruction in kernel.code:
        try:
            code.append((instruction.text, _stops(instruction.opcode), decoder.step(instruction)))
        except Exception as error:
            raise AssertionError(f"{instruction.text}\n{type(error).__name__}: {error}") from error
    return code


def _stops(opcode):
    """Whether other programs notice the instruction, or it notices them."""
    return (
        opcode[0] in ("atom", "red", "fence", "membar")
        or "acquire" in opcode
        or "release" in opcode
        or "wait" in opcode
    )


class _Decoder:
    def __init__(self, kernel):
        self.kernel = kernel

    # Operands

    def read(self, operand, kind):
        """A function of the program: the operand as an array of a type."""
        dtype = np.dtype(TYPES[kind])
        if operand in SPECIAL:
            return lambda p: p.special[operand].view(dtype)
        if operand in self.kernel.shared:
            operand = str(self.kernel.shared[operand])
        if not self.kernel.is_register(operand):
            constant = np.full(self.kernel.threads, number(operand, kind))
            return lambda p: constant
        held = np.dtype(self.kernel.dtype(operand))
        if held.itemsize == dtype.itemsize:
            return lambda p: p.registers[operand].view(dtype)
        assert held.itemsize > dtype.itemsize, f"{operand} is narrower than {kind}"
        narrow = UNSIGNED[dtype.itemsize]
        return lambda p: p.registers[operand].astype(narrow).view(dtype)

    def write(self, operand, kind):
        """A function (program, array of a type, mask or None) that puts it into a register."""
        dtype, held = np.dtype(TYPES[kind]), np.dtype(self.kernel.dtype(operand))
        wide = (
            dtype
            if held.itemsize == dtype.itemsize
            else held
            if dtype.kind == "u"
            else np.dtype(f"i{held.itemsize}")
        )

        def put(p, value, mask):
            value = value.astype(dtype, copy=False).astype(wide, copy=False).view(held)
            if mask is not None:
                value = np.where(mask, value, p.registers[operand])
            p.registers[operand] = value

        return put

    def packed(self, operands, kind):
        """A function of the program: several registers as [threads, n]."""
        reads = [self.read(operand, kind) for operand in operands]
        return lambda p: np.stack([read(p) for read in reads], 1)

    def unpacked(self, operands, kind):
        writes = [
            (column, self.write(operand, kind))
            for column, operand in enumerate(operands)
            if operand != "_"
        ]

        def put(p, values, mask):
            for column, write in writes:
                write(p, np.ascontiguousarray(values[:, column]), mask)

        return put

    def address(self, operand):
        """A function of the program: int64 addresses."""
        assert isinstance(operand, Address)
        if operand.base in self.kernel.shared:
            fixed = np.full(self.kernel.threads, self.kernel.shared[operand.base] + operand.offset)
            return lambda p: fixed
        kind = "u64" if self.kernel.dtype(operand.base) is np.uint64 else "u32"
        base = self.read(operand.base, kind)
        return lambda p: base(p).astype(np.int64) + operand.offset

    # Instructions

    def step(self, instruction):
        """The instruction under its guard."""
        body = self.body(instruction)
        if not instruction.guard:
            return lambda p: body(p, p.active)
        guard, negated = self.read(instruction.guard, "pred"), instruction.negated

        def step(p):
            mask = guard(p) ^ negated
            if p.active is not None:
                mask = mask & p.active
            if mask.all():
                body(p, None)
            elif mask.any():
                body(p, mask)

        return step

    def body(self, instruction):
        opcode, operands = instruction.opcode, instruction.operands
        name = opcode[0].split(":")[0]
        if name in NOTHING or ".".join(opcode) in NOTHING:
            return lambda p, mask: None
        special = getattr(self, f"_{name}", None)
        return (special and special(opcode, operands)) or self._plain(opcode, operands)

    def _plain(self, opcode, operands):
        known = arithmetic.operation(opcode)
        if known is None or known[2] is None:
            return _unknown
        kinds, result, function = known
        kinds = kinds + kinds[-1:] * (len(operands) - 1 - len(kinds))
        reads = [
            self.read(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=False)
        ]
        write = self.write(operands[0], result)
        return lambda p, mask: write(p, function(*[read(p) for read in reads]), mask)

    def _mov(self, opcode, operands):
        """Between a register and the pieces of one."""
        target, source = operands
        if not isinstance(source, tuple) and not isinstance(target, tuple):
            return None
        size = np.dtype(TYPES[opcode[-1]]).itemsize
        if isinstance(source, tuple):
            pieces, whole = (
                self.packed(source, f"b{8 * size // len(source)}"),
                self.write(target, opcode[-1]),
            )
            return lambda p, mask: whole(p, pieces(p).view(UNSIGNED[size])[:, 0], mask)
        read, write = (
            self.read(source, opcode[-1]),
            self.unpacked(target, f"b{8 * size // len(target)}"),
        )
        piece = UNSIGNED[size // len(target)]
        return lambda p, mask: write(
            p, np.ascontiguousarray(read(p)).view(piece).reshape(-1, len(target)), mask
        )

    def _bra(self, opcode, operands):
        target = self.kernel.labels[operands[0]]
        return lambda p, mask: p.branch(target, mask)

    def _ret(self, opcode, operands):
        return lambda p, mask: p.leave(everyone(p) if mask is None else mask)

    _exit = _ret

    def _bar(self, opcode, operands):
        if opcode != ("bar", "sync") or operands != ("0",):
            return None  # of some threads
        return together(lambda p: p.barrier())

    def _fence(self, opcode, operands):
        if opcode[1] == "proxy":
            return together(lambda p: p.shared.unfenced.fill(False))

        def fence(p, mask):
            threads = everyone(p) if mask is None else mask
            for thread in np.flatnonzero(threads):
                p.view.release(thread)
            p.view.acquire(threads)

        return fence

    _membar = _fence

    def _griddepcontrol(self, opcode, operands):
        return together(lambda p: p.view.wait())

    def _shfl(self, opcode, operands):
        target, source, other, clamp, members = operands
        if (
            opcode[1:3] not in (("sync", "bfly"), ("sync", "idx"))
            or clamp != "31"
            or members != "-1"
        ):
            return None
        read, by, write = (
            self.read(source, "u32"),
            self.read(other, "u32"),
            self.write(target, "u32"),
        )
        lane = np.arange(self.kernel.threads)

        def shuffle(p):
            place = by(p) % 32
            write(
                p, read(p)[lane ^ place if opcode[2] == "bfly" else lane // 32 * 32 + place], None
            )

        return together(shuffle)

    # Memory

    def _ld(self, opcode, operands):
        kind, count = _layout(opcode)
        if "relaxed" in opcode or "volatile" in opcode:
            return None
        if "param" in opcode:
            write, name = self.write(operands[0], kind), operands[1].base
            return lambda p, mask: write(
                p, np.full(p.threads, number(str(p.params[name]), kind)), mask
            )
        targets = operands[0] if isinstance(operands[0], tuple) else operands[:1]
        address, write, width = (
            self.address(operands[1]),
            self.unpacked(targets, kind),
            count * np.dtype(TYPES[kind]).itemsize,
        )
        shared, acquire = _space(opcode) == "shared", "acquire" in opcode

        def load(p, mask):
            if acquire:
                p.view.acquire(everyone(p) if mask is None else mask)
            data = (p.shared if shared else p.view).load(address(p), width, mask)
            write(p, data.view(TYPES[kind]), mask)

        return load

    def _st(self, opcode, operands):
        kind, _ = _layout(opcode)
        sources = operands[1] if isinstance(operands[1], tuple) else operands[1:2]
        address, read, shared = (
            self.address(operands[0]),
            self.packed(sources, kind),
            _space(opcode) == "shared",
        )
        if "release" in opcode or "relaxed" in opcode:
            return None
        return lambda p, mask: (p.shared if shared else p.view).store(
            address(p), read(p).view(np.uint8), mask
        )

    def _atom(self, opcode, operands):
        """atom and red: one thread after the other, on memory itself."""
        change = {
            "add": np.add,
            "exch": lambda old, new: new,
            "max": np.maximum,
            "min": np.minimum,
        }.get(opcode[-2])
        if change is None or "global" not in opcode:
            return None
        kind, dtype = opcode[-1], TYPES[opcode[-1]]
        order = next(
            (part for part in opcode if part in ("acquire", "release", "acq_rel")), "relaxed"
        )
        target = operands[0] if opcode[0] == "atom" else None
        place, value = self.address(operands[-2]), self.read(operands[-1], kind)
        write = (
            self.unpacked(target if isinstance(target, tuple) else (target,), kind)
            if target
            else None
        )

        def atomic(p, mask):
            values = value(p)

            def changed(old, thread):
                return (
                    change(old.view(dtype), values[thread : thread + 1])
                    .astype(dtype)
                    .view(np.uint8)
                )

            old = p.view.atomic(place(p), np.dtype(dtype).itemsize, mask, changed, order)
            if write:
                write(p, old.view(dtype), mask)

        return atomic

    _red = _atom

    def _cp(self, opcode, operands):
        if opcode[:2] != ("cp", "async"):
            return None
        if opcode[2] == "commit_group":
            return together(lambda p: p.shared.commit())
        if opcode[2] == "wait_group":
            return together(lambda p: p.shared.wait(int(operands[0])))
        target, source, width = (
            self.address(operands[0]),
            self.address(operands[1]),
            int(operands[2], 0),
        )
        given = self.read(
            operands[3] if len(operands) > 3 else str(width), "u32"
        )  # bytes; the rest is zeros

        def copy(p, mask):
            some = given(p)
            assert np.isin(some, (0, width)).all(), "a part of a copy"
            reads = some > 0 if mask is None else mask & (some > 0)
            p.shared.copy_later(target(p), p.view.load(source(p), width, reads), mask)

        return copy

    # Tensor cores

    def _ldmatrix(self, opcode, operands):
        count, transposed = int(opcode[4][1]), "trans" in opcode
        address, write = self.address(operands[1]), self.unpacked(operands[0], "b32")

        def load(p):
            mask = np.arange(p.threads) % 32 < 8 * count
            write(
                p,
                tensor_cores.ldmatrix(p.shared.load(address(p), 16, mask), count, transposed),
                None,
            )

        return together(load)

    def _stmatrix(self, opcode, operands):
        count, transposed = int(opcode[4][1]), "trans" in opcode
        address, read = self.address(operands[0]), self.packed(operands[1], "b32")

        def store(p):
            mask = np.arange(p.threads) % 32 < 8 * count
            p.shared.store(address(p), tensor_cores.stmatrix(read(p), transposed), mask)

        return together(store)

    def _mma(self, opcode, operands):
        shape, bf16 = (
            next(part for part in opcode if re.fullmatch(r"m\d+n\d+k\d+", part)),
            opcode[-2] == "bf16",
        )
        if opcode[-4] != "f32" or opcode[-1] != "f32" or opcode[-2] not in ("bf16", "f16"):
            return None
        write, left, right = (
            self.unpacked(operands[0], "f32"),
            self.packed(operands[1], "b32"),
            self.packed(operands[2], "b32"),
        )
        acc = self.packed(operands[3], "f32")
        if shape == "m16n8k16" and opcode[1] == "sync":
            return together(
                lambda p: write(p, tensor_cores.mma(left(p), right(p), acc(p), bf16), None)
            )
        if shape != "m16n8k32" or opcode[1] != "sp::ordered_metadata":
            return None
        word, selector = self.read(operands[4], "u32"), int(operands[5], 0)
        return together(
            lambda p: write(
                p, tensor_cores.mma_sp(left(p), right(p), acc(p), word(p), selector, bf16), None
            )
        )

    def _wgmma(self, opcode, operands):
        if opcode[1] == "commit_group":
            return together(_commit)
        if opcode[1] == "wait_group":
            return together(lambda p: _wait(p, int(operands[0])))
        shape, bf16 = re.fullmatch(r"m64n(\d+)k16", opcode[4]), opcode[-1] == "bf16"
        if (
            not shape
            or opcode[5:] not in (("f32", "bf16", "bf16"), ("f32", "f16", "f16"))
            or operands[4:6] != ("1", "1")
        ):
            return None
        acc, write, scale = (
            self.packed(operands[0], "f32"),
            self.unpacked(operands[0], "f32"),
            self.read(operands[3], "pred"),
        )
        right, major = self.read(operands[2], "u64"), [flag == "1" for flag in operands[6:]]
        in_registers = isinstance(operands[1], tuple)
        left = self.packed(operands[1], "b32") if in_registers else self.read(operands[1], "u64")

        def multiply(p):
            for first in range(0, p.threads, 128):
                group = slice(first, first + 128)
                held, columns = (
                    left(p)[group],
                    tensor_cores.descriptor(_one(right(p)[group]), int(shape[1]), major[-1]),
                )
                p.shared.operand(
                    columns
                )  # checked now, and read again when the product is computed
                rows = None if in_registers else tensor_cores.descriptor(_one(held), 64, major[0])
                if not in_registers:
                    p.shared.operand(rows)
                p.later.append(
                    (group, held, rows, columns, acc, write, scale(p)[group, None], bf16)
                )

        return together(multiply)


def together(action):
    """A step that all threads must take at once."""

    def step(p, mask):
        assert mask is None, "not all threads take part"
        action(p)

    return step


def everyone(p):
    return np.full(p.threads, True)


def _commit(p):
    p.groups.append(p.later)
    p.later = []


def _wait(p, pending):
    """The products of all but the last groups, computed only now: reading a sum, or writing an
    operand, earlier is an error.
    """
    while len(p.groups) > pending:
        for group, held, rows, columns, acc, write, scale, bf16 in p.groups.pop(0):
            left = tensor_cores.wgmma_left(held) if rows is None else p.shared.operand(rows)
            sums = acc(p)
            before = np.where(scale, sums[group], np.float32(0))
            sums[group] = tensor_cores.wgmma(left, p.shared.operand(columns), before, bf16)
            write(p, sums, None)


def _one(values):
    assert (values == values[0]).all(), "threads disagree about an operand"
    return values[0]


def _layout(opcode):
    """The type of an access and how many of it."""
    return opcode[-1], int(opcode[-2][1:]) if opcode[-2] in ("v2", "v4", "v8") else 1


def _space(opcode):
    return next(
        (part.split(":")[0] for part in opcode if part.split(":")[0] in ("global", "shared")),
        "generic",
    )


def _unknown(p, mask):
    raise AssertionError("the emulator does not know this instruction")

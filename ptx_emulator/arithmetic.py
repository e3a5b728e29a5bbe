"""What the instructions compute that touch registers alone: opcode -> types of the operands and a
function of numpy arrays.
"""

import numpy as np

from ptx_emulator.ptx import TYPES


def shift_left(a, b):
    return np.where(
        b < 8 * a.itemsize, a << np.minimum(b, 8 * a.itemsize - 1).astype(a.dtype), a.dtype.type(0)
    )


def shift_right(a, b):
    last = 8 * a.itemsize - 1
    shifted = a >> np.minimum(b, last).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b <= last, shifted, a.dtype.type(0))


def divide(a, b):
    """Towards zero."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype) if a.dtype.kind == "i" else a // b


def remainder(a, b):
    return (a - divide(a, b) * b).astype(a.dtype)


def fused(a, b, c):
    """float32: the product is exact in float64, so that only the sum is rounded (there, and to
    float32).
    """
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def extract(a, start, length):
    """bfe: `length` bits from `start`; where there are none, the sign of a signed type, else
    zeros.
    """
    width, one = 8 * a.itemsize, np.uint64(1)
    start, length = (
        np.minimum(start & 255, width).astype(np.uint64),
        (length & 255).astype(np.uint64),
    )
    inside = np.minimum(length, width - start)
    bits = a.view(f"u{a.itemsize}").astype(np.uint64)
    result = shift_right(bits, start) & (shift_left(np.full_like(bits, 1), inside) - one)
    if a.dtype.kind == "i":
        sign = shift_right(bits, np.minimum(start + length - one, np.uint64(width - 1))) & one
        result = np.where(
            (sign > 0) & (length > 0),
            result | ~(shift_left(np.full_like(bits, 1), inside) - one),
            result,
        )
    return result.astype(f"u{a.itemsize}").view(a.dtype)


def prmt(a, b, selector):
    """Byte permute: each of four selector nibbles picks one of the eight bytes of b, a; its top bit
    spreads the sign.
    """
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for byte in range(4):
        nibble = selector >> np.uint32(4 * byte) & np.uint32(15)
        picked = both >> ((nibble & 7) * 8).astype(np.uint64) & np.uint64(0xFF)
        picked = np.where(nibble < 8, picked, (picked >> np.uint64(7)) * np.uint64(0xFF))
        result = result | (picked << np.uint64(8 * byte)).astype(np.uint32)
    return result


def by_halves(function, dtype):
    """A function of 16-bit numbers, for two of them in a register."""

    def apply(*packed):
        return (
            function(*(np.ascontiguousarray(part).view(dtype) for part in packed))
            .astype(dtype)
            .view(np.uint32)
        )

    return apply


def logic(a, b, c, table):
    """lop3: bit by bit, the entry of `table` at the place a b c."""
    result = np.zeros_like(a)
    for place in range(8):
        if int(table.flat[0]) >> place & 1:
            result |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return result


def to_bf16(x):
    """float32 -> the bits of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def of_bf16(function):
    """A function of float64, for the bits of bfloat16: rounded once. On the way through float32 a
    result that is not exact has its last bit set, so that none of them is taken for a tie.
    """

    def apply(*bits):
        exact = function(*(from_bf16(each).astype(np.float64) for each in bits))
        near = exact.astype(np.float32)
        inward = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
        odd = inward.view(np.uint32) | (np.isfinite(near) & (inward != exact)).astype(np.uint32)
        return to_bf16(odd.view(np.float32))

    return apply


def convert(target, source):
    """cvt between two types."""
    if target in ("bf16x2", "f16x2"):
        one = to_bf16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        return lambda high, low: (
            one(low).astype(np.uint32) | one(high).astype(np.uint32) << np.uint32(16)
        )
    if target == "bf16":
        return to_bf16
    if source == "bf16":
        return lambda bits: from_bf16(bits).astype(TYPES[target])
    return lambda x: x.astype(TYPES[target])


SAME = {  # all operands have the type of the result
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": divide, "rem": remainder,
    "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "neg": np.negative, "abs": np.abs,
    "mad": lambda a, b, c: a * b + c, "fma": fused, "prmt": prmt, "mov": lambda a: a,
    "cvta": lambda a: a, "lop3": logic,
}  # fmt: skip
SHIFTS = {
    "shl": shift_left,
    "shr": shift_right,
    "bfe": extract,
}  # the first has, the others are u32
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
KNOWN = {"rn", "lo", "wide", "to", "global", "shared"}  # modifiers that say nothing more


def operation(opcode):
    """The types of the operands (the last one again for the rest), the type of the result and the
    function; None if unknown.
    """
    name, *modifiers, kind = opcode
    if kind not in TYPES:
        return None
    if name == "cvt":
        return (
            [kind],
            modifiers[-1],
            convert(modifiers[-1], kind) if set(modifiers[:-1]) <= {"rn", "rzi"} else None,
        )
    if name == "setp" and modifiers[0] in COMPARE and len(modifiers) == 1:
        return [kind], "pred", COMPARE[modifiers[0]]
    if name == "selp":
        return [kind, kind, "pred"], kind, lambda a, b, which: np.where(which, a, b)
    if name in SHIFTS:
        return [kind, "u32"], kind, SHIFTS[name]
    if name == "mul" and modifiers == ["hi"] and kind[1:] in ("16", "32"):
        return (
            [kind],
            kind,
            lambda a, b: (a.astype(f"{a.dtype.kind}8") * b >> 8 * a.itemsize).astype(a.dtype),
        )
    if not set(modifiers) <= KNOWN or name not in SAME:
        return None
    if "wide" in modifiers:
        wide = kind[0] + str(2 * int(kind[1:]))
        dtype = TYPES[wide]
        if name == "mul":
            return [kind], wide, lambda a, b: a.astype(dtype) * b.astype(dtype)
        return [kind, kind, wide], wide, lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c
    if kind in ("s16x2", "u16x2"):
        return [kind], kind, by_halves(SAME[name], np.uint16 if kind == "u16x2" else np.int16)
    if kind == "bf16" and name in ("add", "fma"):
        exact = {"add": np.add, "fma": lambda a, b, c: a * b + c}[name]
        return [kind], kind, of_bf16(exact)
    if kind in ("bf16", "bf16x2", "f16x2"):
        return ([kind], kind, SAME[name]) if name == "mov" else None
    return [kind], kind, SAME[name]

"""PTX text -> instructions, with the names of registers, parameters and labels resolved as far as
they can be.
"""

import re
from dataclasses import dataclass

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    **{f"{kind}{8 * size}": UNSIGNED[size] for kind in "bu" for size in UNSIGNED},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64},
    **{
        "f16x2": np.uint32,
        "bf16x2": np.uint32,
        "s16x2": np.uint32,
        "u16x2": np.uint32,
        "pred": np.bool_,
    },
}


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, base a register or the name of a variable."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    text: str
    guard: str  # the predicate register it depends on, or ""
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple  # str, Address, or a tuple of str for `{a, b}`


@dataclass(frozen=True)
class Kernel:
    name: str
    params: dict[str, str]  # name -> type, in order
    threads: int
    registers: dict[str, str]  # name, or prefix of numbered names -> type
    shared: dict[str, int]  # variable -> address
    static: int  # bytes of shared memory that are declared with a size
    code: tuple[Instruction, ...]
    labels: dict[str, int]

    def dtype(self, register: str):
        """The unsigned integer, or bool, that holds a register."""
        kind = self.registers.get(register) or self.registers[register.rstrip("0123456789")]
        return np.bool_ if kind == "pred" else UNSIGNED[np.dtype(TYPES[kind]).itemsize]

    def is_register(self, name: str) -> bool:
        return name in self.registers or name.rstrip("0123456789") in self.registers


def plain(text: str) -> str:
    """PTX without comments, empty lines and what is for debuggers."""
    text = re.sub(r"//.*|^\s*\.loc.*|\$L__tmp\d+:", "", text, flags=re.MULTILINE)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text))


def parse(text: str) -> Kernel:
    """The one kernel in a module, which is `plain`."""
    head = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    assert head, "no kernel in the module"
    params = {
        name: kind
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head[2].strip())
    }
    shared, static = _variables(text)
    registers, code, labels = {}, [], {}
    for line in _body(text[head.end() :]).splitlines():
        for statement in _statements(line):
            if match := re.fullmatch(r"(\$?\w+):", statement):
                labels[match[1]] = len(code)
            elif match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement):
                for name in match[2].split(","):
                    register = name.split("<")[0].strip()
                    assert registers.setdefault(register, match[1]) == match[1], (
                        f"two registers {register}"
                    )
            elif not statement.startswith("."):
                code.append(_instruction(statement))
    threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])[1])
    return Kernel(head[1], params, threads, registers, shared, static, tuple(code), labels)


def _body(text):
    """Up to the brace that closes it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return text[:place]
    raise AssertionError("no end of the kernel")


def _variables(text):
    """Addresses of the shared variables: those with a size, then the one that Triton's allocation
    is.
    """
    shared, size, dynamic = {}, 0, []
    for align, name, extent in re.findall(
        r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]", text
    ):
        if not extent:
            dynamic.append(name)
            continue
        shared[name] = -(-size // int(align)) * int(align)
        size = shared[name] + int(extent)
    size = -(-size // 1024) * 1024  # an allocation that is swizzled begins at a multiple of 1024
    return {**shared, **dict.fromkeys(dynamic, size)}, size


def _statements(line):
    """What is in a line of a body: directives, labels and instructions; the braces of a scope say
    nothing.
    """
    line = re.sub(r"^\s*\{(?=\s*(\.|$))", "", line)
    for part in line.split(";"):
        label = re.match(r"\s*(\$?\w+:)(?!:)", part)
        if label:
            yield label[1]
            part = part[label.end() :]
        part = part.strip()
        if part and part != "}":
            yield part


def _instruction(text):
    text = " ".join(text.split())
    match = re.fullmatch(r"(?:@(!?)(\S+) )?([a-z][\w.:]*)\s*(.*)", text)
    assert match, f"not an instruction: {text}"
    negated, guard, opcode, operands = match.groups()
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
    return Instruction(
        text,
        guard or "",
        bool(negated),
        tuple(opcode.split(".")),
        tuple(_operand(part.strip()) for part in parts),
    )


def _operand(text):
    if text[0] == "{":
        return tuple(name.strip() for name in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    return text


def number(text: str, kind: str) -> np.ndarray:
    """An immediate operand of a type, 0-dimensional."""
    dtype = np.dtype(TYPES[kind])
    if kind == "pred":
        return np.array(int(text, 0) != 0)
    bits = int(text[2:], 16) if text[:2] in ("0f", "0d", "0F", "0D") else int(text.rstrip("U"), 0)
    return np.array(bits & (1 << 8 * dtype.itemsize) - 1, UNSIGNED[dtype.itemsize]).view(dtype)

"""The matrix instructions, from the fragment tables of the PTX ISA: who holds which element.

Registers are uint32 or float32 [threads, n]; thread = 32 · warp + 4 · gid + tig. Products and sums
are exact to float64 and rounded once; hardware may cut off more.
"""

import numpy as np

LANE = np.arange(32)
GID, TIG = LANE // 4, LANE % 4
PAIR = np.arange(2)

# (row, column) of each register's two elements [32, registers, 2] or, of the float32 sums, its one
# [32, registers]
_R4, _R2 = np.arange(4), np.arange(2)
LEFT = (
    GID[:, None, None] + 8 * (_R4 % 2)[:, None],
    2 * TIG[:, None, None] + 8 * (_R4 // 2)[:, None] + PAIR,
)  # 16 x 16
RIGHT = (2 * TIG[:, None, None] + 8 * _R2[:, None] + PAIR, GID[:, None, None])  # 16 x 8
RIGHT_LONG = (2 * TIG[:, None, None] + 8 * _R4[:, None] + PAIR, GID[:, None, None])  # 32 x 8
SUMS = (GID[:, None] + 8 * (_R4 // 2), 2 * TIG[:, None] + _R4 % 2)  # 16 x 8


def floats(words, bf16):
    """uint32 [...] -> the two 16-bit floats in each, float32 [..., 2]."""
    halves = np.stack((words & 0xFFFF, words >> 16), -1)
    if bf16:
        return (halves << 16).astype(np.uint32).view(np.float32)
    return halves.astype(np.uint16).view(np.float16).astype(np.float32)


def _by_warp(registers):
    return np.ascontiguousarray(registers).reshape(-1, 32, registers.shape[1])


def _operand(registers, shape, places, bf16):
    held = _by_warp(registers)
    matrix = np.full((len(held), *shape), np.nan)
    matrix[:, *places] = floats(held, bf16)
    return matrix


def _add(product, acc):
    """acc [threads, 4] + product [warps, 16, 8]."""
    return (_by_warp(acc) + product[:, *SUMS]).astype(np.float32).reshape(-1, 4)


def mma(left, right, acc, bf16):
    """mma.m16n8k16: registers [threads, 4], [threads, 2] and float32 [threads, 4]."""
    return _add(_operand(left, (16, 16), LEFT, bf16) @ _operand(right, (16, 8), RIGHT, bf16), acc)


def mma_sp(left, right, acc, word, selector, bf16):
    """mma.sp.m16n8k32, ordered metadata: registers [threads, 4], word [threads], from lanes 2 ·
    selector + 0, 1 of every four.
    """
    held, words = floats(_by_warp(left), bf16), word.reshape(-1, 32)
    matrix = np.zeros((len(held), 16, 32))
    warp = np.arange(len(held))[:, None]
    for register in range(4):
        row, group = GID + 8 * (register % 2), TIG + 4 * (register // 2)
        given = words[:, 4 * GID + 2 * selector + group // 4] >> np.uint32(16 * (register % 2))
        nibble = given >> (4 * (group % 4)).astype(np.uint32) & 15
        first, second = (nibble & 3).astype(np.int64), (nibble >> 2).astype(np.int64)
        assert (first < second).all(), "metadata is not ordered"
        matrix[warp, row, 4 * group + first] = held[:, :, register, 0]
        matrix[warp, row, 4 * group + second] = held[:, :, register, 1]
    return _add(matrix @ _operand(right, (32, 8), RIGHT_LONG, bf16), acc)


def _of_matrix(transposed):
    """(row, column) of the two elements that a lane holds of an 8 x 8 matrix, [32, 2]."""
    places = (np.repeat(GID[:, None], 2, 1), 2 * TIG[:, None] + PAIR)
    return places[::-1] if transposed else places


def ldmatrix(rows, count, transposed):
    """uint8 [threads, 16], the row that each thread names -> registers [threads, count]."""
    matrices = (
        np.ascontiguousarray(rows)
        .view(np.uint16)
        .reshape(-1, 32, 8)[:, : 8 * count]
        .reshape(-1, count, 8, 8)
    )
    held = matrices[:, :, *_of_matrix(transposed)].astype(np.uint32)
    return (held[..., 0] | held[..., 1] << np.uint32(16)).swapaxes(1, 2).reshape(-1, count)


def stmatrix(registers, transposed):
    """Registers [threads, count] -> the rows, uint8 [threads, 16], of the first 8 · count lanes of
    each warp.
    """
    held, count = _by_warp(registers).swapaxes(1, 2), registers.shape[1]
    matrices = np.zeros((len(held), 4, 8, 8), np.uint16)
    matrices[:, :count, *_of_matrix(transposed)] = np.stack((held & 0xFFFF, held >> 16), -1)
    return matrices.reshape(-1, 8).view(np.uint8)


def descriptor(bits, rows, mn_major):
    """A shared-memory descriptor of wgmma -> addresses of the elements of a tile [rows, 16]; `rows`
    runs over M or N, 16 over K.

    PTX ISA, "Matrix descriptor" and "Strides": the tile is made of atoms of eight lines of 32, 64
    or 128 bytes, whose pieces of 16 bytes are exchanged by the number of the line; without
    swizzling of pieces alone.
    """
    bits = int(bits)
    start, leading, stride = (bits >> place & 0x3FFF for place in (0, 16, 32))
    start, leading, stride = 16 * start, 16 * leading, 16 * stride
    assert not bits >> 49 & 7, "a base offset"
    line = {0: 16, 3: 32, 2: 64, 1: 128}[bits >> 62 & 3]
    mn, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if mn_major:
        wide = line // 2  # elements in a line, along M or N; eight lines along K
        if line == 16:
            leading, stride = stride, leading
        address = start + mn // wide * leading + k // 8 * stride + k % 8 * line + mn % wide * 2
    elif line == 16:
        address = start + mn // 8 * stride + mn % 8 * 16 + k // 8 * leading + k % 8 * 2
    else:
        address = start + mn // 8 * stride + mn % 8 * line + k * 2
    return address ^ (address >> 7 & line // 16 - 1) << 4


def wgmma_left(registers):
    """Registers [128, 4] -> 16-bit elements [64, 16]."""
    held = _by_warp(registers)
    tile = np.zeros((4, 16, 16), np.uint16)
    tile[:, *LEFT] = np.stack((held & 0xFFFF, held >> 16), -1)
    return tile.reshape(64, 16)


def wgmma(left, right, acc, bf16):
    """uint16 [64, 16] and [N, 16] -> acc float32 [128, N / 2] + their product."""

    def values(x):
        return (
            (x.astype(np.uint32) << 16).view(np.float32) if bf16 else x.view(np.float16)
        ).astype(np.float64)

    product = (values(left) @ values(right).T).reshape(4, 16, -1)
    register = np.arange(acc.shape[1])
    row, column = (
        GID[:, None] + 8 * (register % 4 // 2),
        8 * (register // 4) + 2 * TIG[:, None] + register % 2,
    )
    return (_by_warp(acc) + product[:, row, column]).astype(np.float32).reshape(128, -1)

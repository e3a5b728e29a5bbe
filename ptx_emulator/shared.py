"""The shared memory of a program, and which warp last touched each part of a memory.

What a warp wrote is another warp's only after a barrier. What is read or overwritten earlier is an
AssertionError, as is reading what nobody wrote. The threads of one warp are taken to go in step,
and to write what is there already is nothing.
"""

import numpy as np

WARP = 32
CELL = 2  # bytes that are tracked together


def put(copied, offsets, data):
    """Rows of bytes to offsets that are multiples of their length."""
    rows = copied.reshape(-1, data.shape[1])
    rows[offsets // data.shape[1]] = data
    assert (rows[offsets // data.shape[1]] == data).all(), (
        "race: two threads store different values at one place"
    )


def write(copied, shadow, offsets, data, warps, epoch):
    """The same, checked: what changes must not be what another warp reads or writes in this
    epoch.
    """
    width = data.shape[1]
    changed = (copied.reshape(-1, width)[offsets // width] != data).any(1)
    shadow.check_write(offsets[changed], width, warps[changed], epoch)
    shadow.write(offsets, width, warps, epoch)
    put(copied, offsets, data)


class Shadow:
    """Which warp last wrote and read each cell, and in which epoch, the number of barriers
    before.
    """

    def __init__(self, size, written=False):
        cells = size // CELL + 1
        self.write_epoch = np.full(cells, -1 if written else -2)  # -2: nobody wrote it
        self.read_epoch = np.full(cells, -1)
        self.writer, self.reader = np.zeros(cells, np.int64), np.zeros(cells, np.int64)

    def read(self, offsets, width, warps, epoch):
        cells, warps = _cells(offsets, width, warps)
        written = self.write_epoch[cells]
        assert (written > -2).all(), "read before anything was written"
        assert not ((written == epoch) & (self.writer[cells] != warps)).any(), (
            "race: read where another warp writes"
        )
        others = (self.read_epoch[cells] == epoch) & (self.reader[cells] != warps)
        self.read_epoch[cells], self.reader[cells] = epoch, warps
        others |= self.reader[cells] != warps
        self.reader[cells[others]] = -1  # several

    def check_write(self, offsets, width, warps, epoch):
        """Before a write of something else than what is there."""
        cells, warps = _cells(offsets, width, warps)
        for epochs, last, what in (
            (self.read_epoch, self.reader, "reads"),
            (self.write_epoch, self.writer, "writes"),
        ):
            assert not ((epochs[cells] == epoch) & (last[cells] != warps)).any(), (
                f"race: written where another warp {what}"
            )

    def write(self, offsets, width, warps, epoch):
        cells, warps = _cells(offsets, width, warps)
        self.write_epoch[cells], self.writer[cells] = epoch, warps


def _cells(offsets, width, warps):
    per = max(1, width // CELL)
    return (offsets[:, None] // CELL + np.arange(per)).ravel(), np.repeat(warps, per)


class Shared:
    """The shared memory of a program. Copies by `cp.async` arrive when their group is waited for,
    and not before.
    """

    def __init__(self, size):
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.size = size
        self.shadow = Shadow(len(self.bytes))
        self.unfenced = np.zeros(len(self.bytes), bool)  # written since the last fence.proxy.async
        self.epoch = 0
        self.open, self.groups = [], []
        self.requests, self.cycles = (
            0,
            0,
        )  # of 128 bytes; one cycle each, and more where lanes meet in a bank

    def _threads(self, addresses, width, mask):
        threads = np.arange(len(addresses)) if mask is None else np.flatnonzero(mask)
        offsets = addresses[threads].astype(np.int64)
        assert not (offsets % width).any(), (
            f"an address in shared memory is not a multiple of {width}"
        )
        assert ((offsets >= 0) & (offsets + width <= self.size)).all(), (
            f"out of bounds: shared memory has {self.size} bytes"
        )
        self._count(threads, offsets, max(4, width))
        return threads, offsets

    def _count(self, threads, offsets, width):
        """A request is what so many lanes ask for at once; it takes as long as the bank with the
        most words does.
        """
        words = (offsets[:, None] // 4 + np.arange(width // 4)) | (
            threads[:, None] // (128 // width)
        ) << 32
        distinct = np.unique(words)
        _, met = np.unique(distinct >> 32 << 32 | distinct % 32, return_counts=True)
        requests, first = np.unique(
            np.unique(distinct >> 32 << 32 | distinct % 32) >> 32, return_index=True
        )
        self.requests += len(requests)
        self.cycles += int(np.maximum.reduceat(met, first).sum()) if len(met) else 0

    def load(self, addresses, width, mask):
        """uint8 [threads, width]."""
        threads, offsets = self._threads(addresses, width, mask)
        self.shadow.read(offsets, width, threads // WARP, self.epoch)
        data = np.zeros((len(addresses), width), np.uint8)
        data[threads] = self.bytes.reshape(-1, width)[offsets // width]
        return data

    def store(self, addresses, data, mask):
        width = data.shape[1]
        threads, offsets = self._threads(addresses, width, mask)
        write(self.bytes, self.shadow, offsets, data[threads], threads // WARP, self.epoch)
        self.unfenced[(offsets[:, None] + np.arange(width)).ravel()] = True

    def copy_later(self, addresses, data, mask):
        threads, offsets = self._threads(addresses, data.shape[1], mask)
        self.shadow.check_write(offsets, data.shape[1], threads // WARP, self.epoch)
        self.open.append((addresses, data, mask))

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending):
        while len(self.groups) > pending:
            for copy in self.groups.pop(0):
                self.store(*copy)

    def operand(self, addresses):
        """16-bit elements that a warp group reads as an operand of wgmma; `addresses` [rows,
        columns].
        """
        flat = addresses.ravel()
        assert ((flat >= 0) & (flat + 2 <= self.size)).all(), (
            f"out of bounds: shared memory has {self.size} bytes"
        )
        assert not self.unfenced[flat].any(), "no fence.proxy.async between a store and wgmma"
        self.shadow.read(flat, 2, np.full(len(flat), -1), self.epoch)
        return self.bytes.view(np.uint16)[addresses // 2]

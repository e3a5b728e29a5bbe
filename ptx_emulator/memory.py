"""Memory as weak as PTX allows, and checked: bounds, alignment, races.

Global memory. A program sees the bytes that were there at the launch, and what it stores itself.
Its stores reach the others when a thread releases for which they are ordered before: its own, and
those of other threads before a barrier. It sees what others released when a thread acquires: that
thread at once, its other threads from the next barrier on. So whatever the protocol between
programs forgets is a wrong result in every run, and not once in a million.

Within a program, what a warp wrote is another warp's only after a barrier (shared.py).
"""

from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.shared import WARP, Shadow, put, write

SECTOR = 32  # bytes that the hardware moves at once


@dataclass
class Region:
    """An argument's bytes. Copies begin at `base` and are a multiple of 16 long, so that they can
    be viewed in wider types.
    """

    name: str
    start: int
    stop: int
    real: np.ndarray  # the memory itself, start to stop
    requested: int = 0  # sectors, summed over the requests of warps
    sectors: set[int] = field(default_factory=set)  # read at least once

    @property
    def base(self):
        return self.start & ~15

    def copy(self):
        copied = np.zeros(-(-(self.stop - self.base) // 16) * 16, np.uint8)
        copied[self.start - self.base : self.stop - self.base] = self.real
        return copied


class Memory:
    """The regions of a launch. `before`: (address, bytes) that a program sees until it waits for
    the launch before this one.

    None: that launch is over when this one begins.
    """

    def __init__(self, regions, before=None):
        self.regions, self.waits = regions, before is not None
        self.launched, self.early = ([region.copy() for region in regions] for _ in range(2))
        for address, old in before or ():
            for region, copied in zip(regions, self.early, strict=True):
                low, high = max(address, region.start), min(address + len(old), region.stop)
                if low < high:
                    copied[low - region.base : high - region.base] = old[
                        low - address : high - address
                    ]

    def locate(self, addresses, width, mask):
        """(place of the region, threads, offsets from its base) of an access of `width` bytes by
        the threads in the mask.
        """
        threads = np.arange(len(addresses)) if mask is None else np.flatnonzero(mask)
        addresses = addresses[threads].astype(np.int64)
        assert not (addresses % width).any(), f"an address is not a multiple of {width}"
        missing = np.ones(len(threads), bool)
        for place, region in enumerate(self.regions):
            inside = (addresses >= region.start) & (addresses + width <= region.stop)
            if inside.all():
                yield place, threads, addresses - region.base
                return
            if inside.any():
                yield place, threads[inside], addresses[inside] - region.base
                missing &= ~inside
        if missing.any():
            thread, address = threads[missing][0], int(addresses[missing][0])
            region = min(
                self.regions,
                key=lambda region: min(abs(address - region.start), abs(address - region.stop)),
            )
            raise AssertionError(
                f"out of bounds: thread {thread}, {width} bytes at {region.name} + "
                f"{address - region.start} of {len(region.real)}"
            )

    def count(self, region, threads, offsets, width):
        """Add a read of a warp each to the traffic."""
        sectors = (offsets + region.base)[:, None] // SECTOR + np.arange(-(-width // SECTOR))
        requests = np.unique(sectors | (threads[:, None] // WARP) << 48)
        region.requested += len(requests)
        region.sectors.update((requests & (1 << 48) - 1).tolist())


class View:
    """Global memory as one program sees it."""

    def __init__(self, memory):
        self.memory = memory
        self.copies = list(memory.early)  # shared with the others until it is written
        self.fresh = None  # what `acquired` threads see already, the others after the next barrier
        self.acquired = None
        self.stores = []  # not yet released: region, threads, offsets, bytes, epoch
        self.shadows = {}
        self.epoch = 0
        self.waits = memory.waits  # the launch before this one may not have ended

    def load(self, addresses, width, mask):
        """uint8 [threads, width], zeros for the others."""
        data = np.zeros((len(addresses), width), np.uint8)
        for place, threads, offsets in self.memory.locate(addresses, width, mask):
            if place in self.shadows:
                self.shadows[place].read(offsets, width, threads // WARP, self.epoch)
            seen = self.copies[place].reshape(-1, width)[offsets // width]
            if self.fresh is not None:
                newer = self.fresh[place].reshape(-1, width)[offsets // width]
                seen = np.where(self.acquired[threads][:, None], newer, seen)
            data[threads] = seen
            self.memory.count(self.memory.regions[place], threads, offsets, width)
        return data

    def store(self, addresses, data, mask):
        assert not self.waits, "a store before griddepcontrol.wait"
        width = data.shape[1]
        for place, threads, offsets in self.memory.locate(addresses, width, mask):
            if place not in self.shadows:
                self.shadows[place] = Shadow(len(self.copies[place]), written=True)
                self.copies[place] = self.copies[place].copy()
            write(
                self.copies[place],
                self.shadows[place],
                offsets,
                data[threads],
                threads // WARP,
                self.epoch,
            )
            if self.fresh is not None:
                put(self.fresh[place], offsets, data[threads])
            self.stores.append((place, threads, offsets, data[threads], self.epoch))

    def barrier(self):
        self.epoch += 1
        if self.fresh is not None:
            self.copies, self.fresh = self.fresh, None

    def release(self, thread):
        """The stores ordered before this point of a thread become visible to others."""
        kept = []
        for place, threads, offsets, data, epoch in self.stores:
            now = np.full(len(threads), True) if epoch < self.epoch else threads == thread
            self._publish(place, offsets[now], data[now])
            if not now.all():
                kept.append((place, threads[~now], offsets[~now], data[~now], epoch))
        self.stores = kept

    def finish(self):
        for place, _, offsets, data, _ in self.stores:
            self._publish(place, offsets, data)

    def _publish(self, place, offsets, data):
        region = self.memory.regions[place]
        for byte in range(data.shape[1]):
            region.real[offsets + byte - (region.start - region.base)] = data[:, byte]

    def acquire(self, threads):
        """What others released becomes visible to `threads` (a mask) now."""
        self.fresh = [region.copy() for region in self.memory.regions]
        for place, _, offsets, data, _ in self.stores:
            put(self.fresh[place], offsets, data)
        self.acquired = threads if self.acquired is None else self.acquired | threads

    def wait(self):
        """griddepcontrol.wait: the launch before this one is over, and what it stored is there."""
        if self.waits:
            self.copies, self.waits = list(self.memory.launched), False

    def atomic(self, addresses, width, mask, change, order):
        """`change(old bytes, thread) -> new bytes`, by one thread after the other on memory itself;
        gives the old bytes.
        """
        assert not self.waits, "an atomic before griddepcontrol.wait"
        old = np.zeros((len(addresses), width), np.uint8)
        for place, threads, offsets in self.memory.locate(addresses, width, mask):
            region = self.memory.regions[place]
            for thread, offset in zip(threads, offsets, strict=True):
                if order in ("release", "acq_rel"):
                    self.release(thread)
                bytes_ = region.real[offset + region.base - region.start :][:width]
                old[thread] = bytes_
                bytes_[:] = change(old[thread], thread)
                if order in ("acquire", "acq_rel"):
                    self.acquire(np.arange(len(addresses)) == thread)
        return old


def traffic(regions):
    """name -> (sectors requested by warps, distinct sectors), of reads."""
    return {region.name: (region.requested, len(region.sectors)) for region in regions}

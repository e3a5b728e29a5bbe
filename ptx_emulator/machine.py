"""Programs of a kernel, executed instruction by instruction for all their threads at once, and the
order in which they go on.
"""

from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.memory import Memory, View
from ptx_emulator.ptx import Kernel
from ptx_emulator.shared import Shared


class Registers(dict):
    """Arrays by name. One that nobody wrote is all ones, NaN as a float: compilers read some whose
    value is of no account.
    """

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def __missing__(self, name):
        return ~np.zeros(self.kernel.threads, self.kernel.dtype(name))


@dataclass
class Program:
    """The state of one program. `active` is None while all threads are at `place`, else a mask; the
    others wait elsewhere.
    """

    params: dict
    special: dict
    view: View
    shared: Shared
    threads: int
    registers: Registers
    place: int = 0
    active: np.ndarray | None = None
    waiting: dict = field(default_factory=dict)  # place -> mask
    later: list = field(default_factory=list)  # wgmma since the last commit
    groups: list = field(default_factory=list)

    def branch(self, target, taken):
        """Threads in `taken` (None: all active ones) go on at `target`."""
        here = np.full(self.threads, True) if self.active is None else self.active
        taken = here if taken is None else taken
        for place, mask in ((target, taken), (self.place, here & ~taken)):
            if mask.any():
                self.waiting[place] = self.waiting.get(place, False) | mask
        self._resume()

    def leave(self, gone):
        here = np.full(self.threads, True) if self.active is None else self.active
        if (here & ~gone).any():
            self.waiting[self.place] = self.waiting.get(self.place, False) | here & ~gone
        self._resume()

    def meet(self):
        """Where some threads wait: the hindmost go first, so that all come together again behind a
        branch.
        """
        if self.waiting and min(self.waiting) <= self.place:
            self.waiting[self.place] = self.waiting.get(self.place, False) | self.active
            self._resume()

    def _resume(self):
        if not self.waiting:
            self.place = -1
            return
        self.place = min(self.waiting)
        mask = self.waiting.pop(self.place)
        self.active = None if mask.all() else mask

    def barrier(self):
        self.view.barrier()
        self.shared.epoch += 1


def run(program: Program, code):
    """Generator over a program: it stops before each instruction that another program may notice or
    be noticed by.
    """
    while program.place >= 0:
        if program.waiting:
            program.meet()
        text, stops, step = code[program.place]
        if stops:
            yield
        program.place += 1
        try:
            step(program)
        except Exception as error:
            raise AssertionError(f"{text}\n{type(error).__name__}: {error}") from error


def execute(
    kernel: Kernel, code, grid, params, memory: Memory, shared: int, seed: int
) -> tuple[int, int]:
    """Run all programs of a grid, interleaved at random.

    Args:
        kernel: parsed PTX, and `code` what it was decoded to.
        grid: three numbers.
        params: the kernel's parameters in order, integers.
        memory: what they may touch.
        shared: bytes of shared memory that the launch asks for.
        seed: of the order.

    Returns:
        Requests to shared memory and the cycles they take, of all programs.
    """
    generator = np.random.default_rng(seed)
    threads = np.arange(kernel.threads, dtype=np.uint32)
    fixed = {"%tid.x": threads, "%laneid": threads % 32, "%warpid": threads // 32}
    sizes = {
        "%ntid.x": kernel.threads,
        **{f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)},
    }
    views, shares, running = [], [], []
    for place in np.ndindex(*grid[::-1]):
        numbers = {**sizes, **{f"%ctaid.{axis}": at for axis, at in zip("zyx", place, strict=True)}}
        special = fixed | {
            name: np.full(kernel.threads, value, np.uint32) for name, value in numbers.items()
        }
        views.append(View(memory))
        shares.append(Shared(kernel.static + shared))
        given = dict(zip(kernel.params, params, strict=True))
        running.append(
            run(
                Program(given, special, views[-1], shares[-1], kernel.threads, Registers(kernel)),
                code,
            )
        )
    with np.errstate(all="ignore"):
        while running:
            place = generator.integers(len(running))
            if next(running[place], StopIteration) is StopIteration:
                running.pop(place)
    for place in generator.permutation(len(views)):
        views[place].finish()
    return sum(one.requests for one in shares), sum(one.cycles for one in shares)

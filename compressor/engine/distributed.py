"""Several processes that share one run, started by torchrun; alone, everything here does nothing.

    torchrun --nproc-per-node 2 -m compressor prune org/model -o out

For methods that use norms, means and variances only (magnitude, Wanda, DSnoT) the batches of the
calibration are split over the processes, in order: these are exchanged per batch and merged again
in the order of the batches. Gram matrices are never exchanged: for methods that use them each
process runs all batches and builds those of the linears that are its own. Both give the statistics
the bits that one process gives them, so the output is the same. The linears of a block are spread
over the processes by cost; each result is sent to all, and the first one writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from compressor.errors import CompressError, OutputError, ProcessError, UsageError
from compressor.formats import Form, form_of, notes
from compressor.stats import InputStats, moved

Made = tuple[Form, Any]
"""A form, and whatever belongs beside it and can be pickled."""

_PATIENCE = timedelta(
    days=1
)  # a process may wait long for the slowest linear; that one has died is noticed at once


class Group:
    """The processes of a run: `size` of them, this one being number `rank`."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes, and speaks."""
        return self.rank == 0

    def part(self, batches: int) -> slice:
        """The batches of this process. Raises UsageError where there are fewer than processes."""
        if batches < self.size:
            raise UsageError(
                f"{self.size} processes were started, but the calibration makes {batches} batches: "
                f"start at most {batches}, "
                "or give more samples with `num_samples`"
            )
        return slice(batches * self.rank // self.size, batches * (self.rank + 1) // self.size)

    def agreed(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make(*arguments)` gives in the first process; it is not called in the others. An
        error there is one in all.
        """
        if self.size == 1:
            return make(*arguments)
        result, error = None, None
        try:
            result = make(*arguments) if self.first else None
        except (CompressError, OSError) as raised:
            error = raised
        result, told = self._gathered(
            (result, OutputError(str(error)) if isinstance(error, OSError) else error)
        )[0]
        if told:
            raise error or told
        return result

    def joined(self, items: Sequence[Any]) -> list[Any]:
        """The items of all processes, in order."""
        return [item for part in self._gathered(list(items)) for item in part]

    def merged(self, stats: dict[str, InputStats], device: torch.device) -> dict[str, InputStats]:
        """Moments over all batches, on `device`, from those of each process; the names are those of
        linears.
        """
        if self.size == 1:
            return stats
        distinct = list({id(own): own for own in stats.values()}.values())
        index = {id(own): number for number, own in enumerate(distinct)}
        everywhere = self._gathered({name: index[id(own)] for name, own in stats.items()})
        parts = self._gathered(
            [[moved(part, torch.device("cpu")) for part in own.parts or []] for own in distinct]
        )
        samples = self._gathered([own.sample.cpu() for own in distinct])
        merged: dict[tuple[int | None, ...], InputStats] = {}
        by_name = {}
        for name in sorted({name for names in everywhere for name in names}):
            key = tuple(
                names.get(name) for names in everywhere
            )  # its number in each process, None in one that saw no token of it
            if key not in merged:
                there = [(rank, number) for rank, number in enumerate(key) if number is not None]
                rank, number = there[0]
                width, (_, _, moments) = samples[rank][number].shape[1], parts[rank][number][0]
                merged[key] = total = InputStats(width, moments=moments is not None, device=device)
                for rank, number in there:
                    total.add_sample(samples[rank][number].to(device))
                    for part in parts[rank][number]:
                        total.merge(moved(part, device))
            by_name[name] = merged[key]
        return by_name

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Which process makes each of things that cost so much: the dearest first, each to the one
        that has least to do.
        """
        owners, load = [0] * len(costs), [0] * self.size
        for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
            owners[number] = load.index(min(load))
            load[owners[number]] += costs[number]
        return owners

    def shared(
        self, owners: Sequence[int], made: Iterable[Made], device: torch.device
    ) -> Iterator[Made]:
        """All things in turn, from those that each process makes itself; an error in one process is
        one in all.

        Args:
            owners: which process makes each.
            made: this process's own, in order; alone, they are not asked for before their turn.
            device: where they are wanted.
        """
        if self.size == 1:
            yield from made
            return
        mine: list[Made] = []
        error: CompressError | None = None
        try:
            mine = list(made)
        except CompressError as raised:
            error = raised
        if failed := next((raised for raised in self._gathered(error) if raised is not None), None):
            raise failed
        mine.reverse()
        for owner in owners:
            yield self._sent(mine.pop() if owner == self.rank else (None, None), owner, device)

    def _sent(self, made: tuple[Form | None, Any], owner: int, device: torch.device) -> Made:
        form, beside = made
        packed = form.pack() if form else {}
        kinds = [(suffix, tensor.shape, tensor.dtype) for suffix, tensor in packed.items()]
        said = notes(form) if form else {}
        entry, kinds, said, beside = self._gathered(
            (form.entry, kinds, said, beside) if form else None
        )[owner]
        tensors = {}
        for suffix, shape, dtype in kinds:
            tensor = (
                packed[suffix].contiguous()
                if form
                else torch.empty(shape, dtype=dtype, device=device)
            )
            self._broadcast(
                tensor.view(-1).view(torch.uint8), owner
            )  # as bytes: not every backend sends int16
            tensors[suffix] = tensor
        return form or replace(cast(Any, form_of(entry, tensors)), **said), beside

    def _gathered(self, value: Any) -> list[Any]:
        """`value` of every process, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _noticing():
            dist.all_gather_object(values, value)
        return values

    def _broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        with _noticing():
            dist.broadcast(tensor, rank)
        return tensor


ALONE = Group()


@contextmanager
def processes() -> Iterator[Group]:
    """The processes that torchrun started, joined for the time of the `with`; this one alone
    without torchrun.

    Raises:
        ProcessError: they cannot be joined.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _noticing():
        dist.init_process_group(backend, timeout=_PATIENCE)
    yield Group(dist.get_rank(), size)
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


def local_device(device: str) -> str:
    """`auto` and `cuda` are this process's own CUDA device where torchrun started it."""
    if device in ("auto", "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).split(". ")[0]
        raise ProcessError(f"another process of this run is gone: {said[:120]}") from None

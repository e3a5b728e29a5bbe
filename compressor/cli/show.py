"""What the commands share: consoles, progress, quiet libraries."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from compressor.text import size as size  # the commands take it from here

if TYPE_CHECKING:
    from compressor.records.report import BlockRow


class _Console(Console):
    """A console that leaves it to `main` what becomes of a closed pipe; rich ends the process."""

    def on_broken_pipe(self) -> None:
        raise  # called where it was caught


_TERMINAL = sys.stdout is not None and sys.stdout.isatty()
out = _Console(highlight=False, markup=False, soft_wrap=True, width=None if _TERMINAL else 160)
err = Console(
    stderr=True, highlight=False, markup=False
)  # names come from files: no markup in them is ours


def tell(notes: Iterable[str]) -> None:
    """What a user should know, a line each: also of those who want no progress."""
    for note in notes:
        err.print(f"note: {note}", soft_wrap=True)


def tell_of(folder: Path, *, code: bool = False) -> None:
    """What there is to know of a folder that another was made of."""
    from compressor.checkpoint.dequantised import open_model

    reader = open_model(folder)
    tell([*reader.notes, *reader.left(code=code)])


def speaks() -> bool:
    """Whether this process is the only one of its run, or the first of those that torchrun
    started.
    """
    return os.environ.get("RANK", "0") == "0"


def begin(quiet: bool, verbose: bool) -> None:
    """Say that the libraries are being loaded, which takes seconds, and load them."""
    if speaks() and not quiet:
        err.print("loading libraries …", style="dim")
    quiet_libraries(verbose)


def quiet_libraries(verbose: bool) -> None:
    """Leave the terminal to us, unless the user wants to hear everything."""
    import logging
    import warnings

    if not verbose:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore")
        for name in ("lm_eval", "datasets", "huggingface_hub", "httpx"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def pruning_progress(quiet: bool) -> Iterator[Any]:
    """A pipeline Progress: live bars on a terminal, lines elsewhere, nothing if quiet."""
    if quiet:
        yield lambda *args, **kwargs: None
    elif err.is_terminal:
        with _bar() as bar:
            yield _live(bar)
    else:
        yield _lines(time.perf_counter())


def _bar() -> Progress:
    columns = (TextColumn("{task.description:12}"), BarColumn(24), MofNCompleteColumn())
    times = (
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(
        *columns, *times, console=err, speed_estimate_period=86400
    )  # a linear may take many minutes


def _live(bar: Progress) -> Any:
    tasks: dict[str, Any] = {}

    def show(
        step: str,
        done: int,
        total: int,
        block: BlockRow | None = None,
        linear: str = "",
        losses: Any = None,
    ) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=total, note="")
        note = (
            _block_note(block)
            if block
            else f"{_short(linear)}  {_losses(losses)}"
            if linear
            else ""
        )
        bar.update(tasks[step], completed=done, total=total)
        if note:
            bar.update(tasks[step], note=note)
        if (
            step == "linears"
        ):  # so that the blocks, and with them the model, have an estimate before the first is done
            blocks = next(task for task in bar.tasks if task.id == tasks["blocks"])
            bar.update(blocks.id, completed=int(blocks.completed) + min(done / total, 0.999))

    return show


def _lines(started: float) -> Any:
    """A line per block, and one per linear where its method reports losses."""
    begun, last, blocks = started, started, (0, 1)
    steps: dict[str, float] = {}  # when each began

    def line(
        step: str,
        done: int,
        total: int,
        block: BlockRow | None = None,
        linear: str = "",
        losses: Any = None,
    ) -> None:
        nonlocal begun, last, blocks
        now = time.perf_counter()
        if done == total and step not in ("blocks", "linears"):
            err.print(f"{step}: {now - steps.pop(step, last):.1f} s")
        steps.setdefault(step, last if done else now)
        if step == "blocks":
            blocks = (done, total)
            begun = now if done == 0 else begun
        finished = blocks[0] + (done / total if step == "linears" else 0)
        left = f"eta {(now - begun) * (blocks[1] / finished - 1):.0f} s" if finished else ""
        if linear and losses:
            err.print(f"  {linear}  {_losses(losses)}  {now - last:.1f} s  {left}")
        elif block:
            err.print(f"block {done}/{total}  {now - started:.1f} s  {_block_note(block)}  {left}")
        last = now

    return line


def _block_note(block: BlockRow) -> str:
    return "" if block.error is None else f"error {block.error:.4f}"


def _losses(losses: tuple[float, float] | None) -> str:
    """What a method that lowers a loss started from and arrived at."""
    return f"loss {losses[0]:.4f} → {losses[1]:.4f}" if losses else ""


def _short(linear: str) -> str:
    return ".".join(linear.split(".")[-2:])


@contextmanager
def scoring_progress(quiet: bool) -> Iterator[tuple[Any, Any]]:
    """An evaluation's Progress and what takes its notes: a live bar on a terminal, a line for every
    number that is known.
    """
    if quiet:
        yield (lambda step, done, total: None), (lambda text: None)
        return

    def note(text: str) -> None:
        err.print(text, markup=False, soft_wrap=True)

    if not err.is_terminal:
        yield (lambda step, done, total: None), note
        return
    with _bar() as bar:
        task = bar.add_task("", total=None, note="")
        yield (
            (
                lambda step, done, total: bar.update(
                    task, description=step, completed=done, total=total
                )
            ),
            note,
        )


@contextmanager
def counting(what: str, quiet: bool) -> Iterator[Any]:
    """A `(done, total)` callback with a bar on a terminal."""
    if quiet or not err.is_terminal:
        yield lambda done, total: None
        return
    with _bar() as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(title: str, columns: str) -> Table:
    """An empty table without borders; `columns` are headings, right-aligned where they begin with
    `>`.
    """
    made = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for heading in columns.split():
        made.add_column(
            heading.lstrip(">"),
            justify="right" if heading.startswith(">") else "left",
            no_wrap=True,
        )
    return made

"""What the commands share: consoles, progress, quiet libraries."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from compressor.text import size as size  # the commands take it from here

if TYPE_CHECKING:
    from compressor.report import BlockRow

out = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, markup=False)  # names come from files: no markup in them is ours


def speaks() -> bool:
    """Whether this process is the only one of its run, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


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
    """A pipeline Progress: a live bar on a terminal, one line per block elsewhere, nothing if quiet."""
    if quiet:
        yield lambda *args, **kwargs: None
    elif err.is_terminal:
        with _bar() as bar:
            tasks: dict[str, Any] = {}

            def live(step: str, done: int, total: int, block: BlockRow | None = None) -> None:
                if step not in tasks:
                    tasks[step] = bar.add_task(step, total=total, note="")
                bar.update(tasks[step], completed=done, total=total, note=_note(block))

            yield live
    else:
        yield _line_per_block(time.perf_counter())


def _bar() -> Progress:
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=err)


def _note(block: BlockRow | None) -> str:
    return "" if block is None or block.error is None else f"error {block.error:.4f}"


def _line_per_block(started: float) -> Any:
    begun = {"blocks": 0.0, "last": started}

    def line(step: str, done: int, total: int, block: BlockRow | None = None) -> None:
        now = time.perf_counter()
        begun.setdefault(step, now if not done else begun["last"])
        begun["blocks"], begun["last"] = begun["blocks"] or now, now
        if block is None:
            if done == total and step != "linears":
                err.print(f"{step}: {now - begun.pop(step):.1f} s")
                begun["blocks"] = now
            return
        left = (now - begun["blocks"]) / done * (total - done)
        err.print(f"block {done}/{total}  {now - started:.1f} s  {_note(block)}  eta {left:.0f} s")

    return line


@contextmanager
def scoring_progress(quiet: bool) -> Iterator[tuple[Any, Any]]:
    """An evaluation's Progress and what takes its notes: a live bar on a terminal, a line for every number that is known."""
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
        yield (lambda step, done, total: bar.update(task, description=step, completed=done, total=total)), note


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
    """An empty table without borders; `columns` are headings, right-aligned where they begin with `>`."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in columns.split():
        made.add_column(heading.lstrip(">"), justify="right" if heading.startswith(">") else "left", no_wrap=True)
    return made

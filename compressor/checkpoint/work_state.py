"""Where the work state of a run lies, and what of it others need to know; compressor/run/journal.py
writes and reads it.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from compressor.checkpoint.atomic import sync
from compressor.errors import OutputError

BEGIN, COMPLETE, REPORT = "begin", "complete", "report.json"
SCRATCH = "scratch-"  # begins the names of folders that nobody needs once their run has ended


def work_path(output: Path) -> Path:
    """Where the work state of a run that makes `output` lies."""
    return output.with_name(f".{output.name}.partial")


def claim(folder: Path) -> int | None:
    """Make `folder` and lock it: the system lets go when this process ends, however it ends.

    Returns:
        What to close when it is done with; None where the system or the disk has no locks.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.stat(folder).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:  # another run took it for a dead one's before it was locked
            pass
        except OSError:
            os.close(handle)
            return None
        os.close(handle)


def remove_dead(output: Path) -> None:
    """Remove what runs of pack, unpack and import that were killed left beside `output`. A folder
    that is locked belongs to one that is under way.
    """
    mine = re.compile(rf"\.{re.escape(output.name)}\.\d+\.partial")
    for folder in output.parent.glob(f".{glob.escape(output.name)}.*.partial"):
        if fcntl is None or not mine.fullmatch(folder.name):
            continue
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)


def report_path(output: Path) -> Path:
    """Where the record of a run goes that differs from run to run: beside the folder, which does
    not.
    """
    return output.with_name(f"{output.name}.report.json")


def scores_path(folder: Path) -> Path:
    """Where the scores of the checkpoint `folder` are stored."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.eval.json")


def beside(output: Path) -> list[Path]:
    """All that lies beside the folder `output` and is about it: record, scores, page."""
    return [
        report_path(output),
        scores_path(output),
        output.with_name(f"{output.name}.report.html"),
    ]


def name_folder(made: Path, output: Path) -> None:
    """Give the finished folder `made` the name `output`, which nothing has. What lies beside an
    earlier folder of that name is about that one, and goes first.
    """
    for path in beside(output):
        path.unlink(missing_ok=True)
    os.replace(made, output)
    sync(output.parent)


def is_complete(output: Path) -> bool:
    """Whether all of `output` was made, and only its name, or the report beside it, may be
    missing.
    """
    return (
        state_file(work_path(output), BEGIN).is_file()
        and state_file(work_path(output), COMPLETE).is_file()
    )


def state_file(work: Path, name: str) -> Path:
    """The record called `name` in the work state `work`."""
    return work / f"{name}.json"


def damaged(work: Path, what: str) -> OutputError:
    """The error for a work state that cannot be trusted."""
    return OutputError(f"the work state {work} is damaged: {what}; remove {work} to start anew")

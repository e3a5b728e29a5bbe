"""Where the work state of a run lies, and what of it others need to know; compressor/run/journal.py
writes and reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

from compressor.checkpoint.atomic import sync
from compressor.errors import OutputError

BEGIN, COMPLETE, REPORT = "begin", "complete", "report.json"


def work_path(output: Path) -> Path:
    """Where the work state of a run that makes `output` lies."""
    return output.with_name(f".{output.name}.partial")


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

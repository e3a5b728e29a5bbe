"""Where the work state of a run lies, and what of it others need to know; compressor/run/journal.py
writes and reads it.
"""

from __future__ import annotations

from pathlib import Path

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

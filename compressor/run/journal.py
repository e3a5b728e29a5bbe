"""The work state of a run: `.NAME.partial` beside the output NAME, from which a run that was cut
off goes on.

    lock              held by the run that is under way; the system lets go of it when the process
                      ends, however it ends
    begin.json        what was asked for, and the fingerprint; without it the rest counts for
                      nothing
    ids.json, …       results of steps that are done once
    block-00000.json  one record for each finished block, in order
    hidden.0-00001    hidden states entering the next block, of process 0
    factors/          fisher's, of the blocks that are not finished
    spool/, folder/   the writer's: tensors of shards under way, and the folder to be
    scratch-…/        hidden states of a pass that measures; what a killed run left of it is removed
    complete.json     everything is in `folder`; it remains to give it its name

Every record is written new, forced to disk and renamed, after the files it speaks of were forced to
disk; files that are no longer needed are removed after it. Whatever lies there beyond the records
is left over from the block that was cut off. A sum of the record is in it, and sums of the files it
speaks of: what was damaged meanwhile is refused, never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from compressor.checkpoint.atomic import sync, write_file
from compressor.checkpoint.work_state import (
    BEGIN,
    COMPLETE,
    REPORT,
    SCRATCH,
    damaged,
    is_complete,
    name_folder,
    remove_dead,
    report_path,
    state_file,
    work_path,
)
from compressor.errors import CompressError, InterruptedRun, OutputError, ProcessError
from compressor.run.fingerprint import difference


def read_settings(output: Path) -> dict[str, Any]:
    """What the unfinished run of `output` was asked for. Raises OutputError where there is none."""
    work = work_path(output)
    if not state_file(work, BEGIN).is_file():
        there = f"; {output} is there, and complete" if output.is_dir() else ""
        raise OutputError(
            f"there is no unfinished run of {output} to go on with: {work} holds none{there}"
        )
    return _read(work, BEGIN)["settings"]


def describe(output: Path) -> str | None:
    """How far the unfinished run of `output` came and how to go on with it; None where nothing is
    left of one.
    """
    work = work_path(output)
    if not state_file(work, BEGIN).is_file():
        return None
    done = len(list(work.glob("block-*.json")))
    return (
        f"{done} blocks of {output} are done: the same command, or `compress resume {output}`, "
        f"goes on with the next; "
        f"to give it up remove {work}"
    )


def is_running(output: Path) -> bool:
    """Whether a process, on this machine, is at the run that makes `output`."""
    if fcntl is None:
        return False
    try:
        handle = os.open(work_path(output) / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


class Journal:
    """The work state of one run; a context manager.

    It is kept where the run was cut off (a kill, an interruption, a full disk, an error of ours)
    and has something to go on with; an error in what the user gave would come again and leaves
    nothing behind.

    Args:
        output: the folder to be made.
        fingerprint: of `compressor.run.fingerprint`.
        settings: what `compress resume` needs to give the same command again, as JSON values.

    Attributes:
        folder: where the state lies.
        blocks: the records of the finished blocks.
        complete: everything is done but the naming, which `publish` does.

    Raises:
        OutputError: another run is at it, the unfinished run is not this one, or its state is
            damaged; all is left as it was.
    """

    def __init__(
        self, output: Path, fingerprint: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> None:
        self.output, self.folder = output, work_path(output)
        self._begin = {
            "fingerprint": json.loads(json.dumps(fingerprint)),
            "settings": dict(settings),
            "made": [],
        }
        self.blocks: list[dict[str, Any]] = []
        self.complete = False

    def __enter__(self) -> Self:
        made = [
            str(parent) for parent in self.output.resolve().parents if not parent.exists()
        ]  # innermost first
        remove_dead(self.output)
        try:
            self._lock = _lock(self.folder)
        except OSError as error:
            raise OutputError(f"output {self.output} cannot be made: {error.strerror}") from None
        try:
            self._open(made)
        except BaseException as error:
            if not state_file(self.folder, BEGIN).is_file():
                self._remove()
            os.close(self._lock)
            if isinstance(error, OSError):
                raise OutputError(
                    f"output {self.output} cannot be made: {error.strerror}"
                ) from None
            raise
        return self

    def _open(self, made: list[str]) -> None:
        self.complete = is_complete(self.output)
        if self.output.exists() and not self.complete:
            raise OutputError(
                f"output {self.output} exists already; choose another `output` or remove it"
            )
        if not state_file(self.folder, BEGIN).is_file():
            for path in self.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._begin["made"] = made
            _write(self.folder, BEGIN, self._begin)
            return
        begun = _read(self.folder, BEGIN)
        if different := difference(begun["fingerprint"], self._begin["fingerprint"]):
            raise OutputError(
                f"{self.folder} holds an unfinished run of {self.output} that is not this one: "
                f"{different}; "
                f"give the same to go on with it, or remove {self.folder} to start anew"
            )
        for left in self.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(left)
        self._begin = begun
        numbers = sorted(
            int(path.stem[6:])
            for path in self.folder.glob("block-*.json")
            if re.fullmatch(r"block-\d+", path.stem)
        )
        if numbers != list(range(len(numbers))):
            raise damaged(self.folder, "records of blocks are missing")
        self.blocks = [_read(self.folder, f"block-{number:05}") for number in numbers]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        final = isinstance(error, CompressError) and not isinstance(
            error, OutputError | ProcessError | InterruptedRun
        )
        if error is None or final or not self._worth():
            self._remove()
        os.close(self._lock)
        if isinstance(error, OSError):
            left = describe(self.output)
            advice = f"; make room or mend it, then: {left}" if left else ""
            raise OutputError(
                f"output {self.output} could not be written: {error.strerror or error}{advice}"
            ) from None

    def _worth(self) -> bool:
        return any(path.name != "begin.json" for path in self.folder.glob("*.json"))

    def _remove(self) -> None:
        state_file(self.folder, BEGIN).unlink(
            missing_ok=True
        )  # first: what a kill leaves of the rest then counts for nothing
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.output.exists():
            for parent in self._begin["made"]:
                with suppress(OSError):  # somebody else uses it by now
                    os.rmdir(parent)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, a JSON value; where this run got as far before it was cut off, what it gave
        then.
        """
        if state_file(self.folder, name).is_file():
            return _read(self.folder, name)
        value = make()
        _write(self.folder, name, value)
        return value

    def record(self, block: dict[str, Any]) -> None:
        """Note that one more block is finished; all files it speaks of are on disk."""
        _write(self.folder, f"block-{len(self.blocks):05}", block)
        self.blocks.append(block)

    def publish(self, report: str = "") -> dict[str, Any]:
        """Give the finished `folder` its name, and put the report of this run beside it. Returns
        the report.
        """
        folder, output = self.folder / "folder", self.output
        if not self.complete:
            write_file(self.folder / REPORT, report.encode())
            _write(self.folder, COMPLETE, json.loads(report))
            self.complete = True
        value = _read(self.folder, COMPLETE)
        if folder.exists():
            if output.exists():
                raise OutputError(
                    f"output {output} has come into being meanwhile; move it away, then: "
                    f"{describe(output)}"
                )
            name_folder(folder, output)
        if (self.folder / REPORT).exists():
            os.replace(self.folder / REPORT, report_path(output))
            sync(output.parent)
        return value


def _lock(folder: Path) -> int:
    """Take the lock of a work state; the run before may remove the folder while this one waits for
    it.
    """
    if fcntl is None:
        raise OutputError(
            "prune and lowrank need the file locks of Linux and macOS, so that no two runs write "
            "one folder; under Windows use WSL. inspect, verify, eval and load work as they are"
        )
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(folder / "lock").st_ino == os.fstat(handle).st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
            os.close(handle)
        except FileNotFoundError:
            os.close(handle)
        except BlockingIOError:
            owner = os.read(handle, 20).decode(errors="replace")
            os.close(handle)
            raise OutputError(
                f"another run (process {owner}) is making the same output, in {folder}; wait for "
                f"it or choose another `output`"
            ) from None


def _write(work: Path, name: str, value: Any) -> None:
    text = json.dumps(value)
    write_file(state_file(work, name), json.dumps({"sha256": _sum(text), "value": value}).encode())


def _read(work: Path, name: str) -> Any:
    try:
        record = json.loads(state_file(work, name).read_bytes())
        if record["sha256"] == _sum(json.dumps(record["value"])):
            return record["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise damaged(work, f"{name}.json is not what was written")


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

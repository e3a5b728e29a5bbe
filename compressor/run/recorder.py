"""What a run writes down: finished linears, finished blocks, the results of steps done once, and at
the end the output folder and its report.

Of the processes that share a run the first one writes; the others have a recorder that does
nothing, so that the run reads the same in all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.packed_config import compressed_config, module_entry
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.writer import Writer
from compressor.config.recipe import Recipe
from compressor.engine.one_linear import Seen
from compressor.engine.plan import Plan
from compressor.engine.task import Task
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.model.linear import WEIGHT_DTYPES
from compressor.pattern import Pattern
from compressor.records.report import BlockRow, LinearRow, Report, to_json
from compressor.run import plan_file
from compressor.run.journal import Journal


@dataclass(frozen=True)
class Facts:
    """What a run found out before its first block, for the report.

    Attributes:
        recipe: as it is written into the output.
        measured, spectra: of `compressor.allocation.choice.Choice`.
        calibration_tokens: in all samples together.
    """

    recipe: Recipe
    measured: dict[str, Any]
    spectra: list[dict[str, Any]]
    calibration_tokens: int


class NullRecorder:
    """Of a process that is not the first: writes nothing, knows nothing."""

    complete = False

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """None."""

    def begin(self, plan: Plan, facts: Facts) -> None:
        """Nothing."""

    def store(self, task: Task, form: Form, seen: Seen | None) -> None:
        """Nothing."""

    def finish_block(self, row: BlockRow, seconds: float, hidden: list[Any]) -> None:
        """Nothing."""

    def finish(self, run: Mapping[str, Any], check: Callable[[Path], None]) -> None:
        """Nothing."""

    def publish(self) -> None:
        """Nothing."""


class Recorder:
    """Of the first process: keeps the journal, writes the output folder and its report.

    `begin` comes before `store`, `finish_block` and `finish`.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    @property
    def complete(self) -> bool:
        """Whether an earlier run did everything but give the folder its name."""
        return self._journal.complete

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, a JSON value; of a run that goes on, what it gave then."""
        return self._journal.once(name, make)

    def begin(self, plan: Plan, facts: Facts) -> tuple[int, list[Any] | None]:
        """Open the output of `plan`, and take up what the journal has.

        Returns:
            How many blocks are done, and what each process saved of the hidden states after the
            last of them.
        """
        reader, blocks = plan.reader, self._journal.blocks
        self._plan, self._recipe = plan, facts.recipe
        self._writer = Writer(
            reader,
            self._journal.output,
            {task.linear.tensor for task in plan.every},
            self._journal.folder,
        )
        self._writer.restore(record["written"] for record in blocks)
        self._shared = _SharedTensors(plan)
        self._report = Report(
            asdict(facts.recipe),
            plan.skeleton.config.model_type,
            sum(torch.Size(entry.shape).numel() for entry in reader.tensors.values()),
            reader.nbytes,
            linears=[LinearRow(**row) for record in blocks for row in record["linears"]],
            blocks=[BlockRow(**record["block"]) for record in blocks],
            left_dense=plan.left_dense,
            allocation=facts.measured,
            spectra=facts.spectra,
            calibration_tokens=facts.calibration_tokens,
            notes=[*plan.notes, *reader.left(code=facts.recipe.trust_remote_code)],
        )
        self._recorded = len(self._report.linears)  # rows that are in the journal
        return len(blocks), blocks[-1]["hidden"] if blocks else None

    def store(self, task: Task, form: Form, seen: Seen | None) -> None:
        """Write a linear, and add its row to the report."""
        linear = task.linear
        stored = (
            {"weight": form.dense().T}
            if isinstance(form, Dense) and linear.stored_transposed
            else form.pack()
        )
        self._store(task, stored)
        dtype = WEIGHT_DTYPES[self._plan.reader.tensors[linear.tensor].dtype]
        losses, overflowed = _finite(getattr(form, "losses", None))
        notes = [
            getattr(form, "note", ""),
            seen.note if seen else "",
            _why_not_packed(self._plan, task, form),
            overflowed,
        ]
        self._report.linears.append(
            LinearRow(
                name=linear.name,
                shape=list(linear.shape),
                format=form.FORMAT,
                sparsity=form.sparsity,
                error=seen.error if seen else None,
                dense_bytes=linear.size * dtype.itemsize,
                bytes=sum(tensor.nbytes for tensor in stored.values()),
                entry=module_entry(form.entry, linear.place),
                tokens=seen.tokens if seen else None,
                note="; ".join(note for note in notes if note),
                losses=losses,
                pattern=_pattern(task, form),
            )
        )

    def _store(self, task: Task, stored: dict[str, Tensor]) -> None:
        """Write what takes the place of a linear's tensor on disk, or of its part of one."""
        linear = task.linear
        last = self._shared.is_last(task)
        if linear.at is None:
            self._writer.replace(linear.tensor, stored)
        elif "weight" not in stored:
            self._writer.replace(linear.tensor, stored, owner=linear.name, last=last)
        elif (whole := self._shared.filled(task, stored["weight"], last)) is not None:
            self._writer.replace(linear.tensor, {linear.tensor.rpartition(".")[2]: whole})

    def finish_block(self, row: BlockRow, seconds: float, hidden: list[Any]) -> None:
        """Note a finished block, once everything it wrote is on disk.

        Args:
            row: of the block.
            seconds: that it took.
            hidden: what each process saved of the hidden states entering the next one.
        """
        report = self._report
        report.blocks.append(row)
        linears = [asdict(one) for one in report.linears[self._recorded :]]
        self._recorded = len(report.linears)
        self._journal.record(
            {
                "block": asdict(row),
                "linears": linears,
                "written": self._writer.news(),
                "hidden": hidden,
                "seconds": round(seconds, 3),
            }
        )
        self._writer.forget()

    def finish(self, run: Mapping[str, Any], check: Callable[[Path], None]) -> dict[str, Any]:
        """Write what is left to write, and give the folder its name.

        Args:
            run: what differs from run to run, for the report beside the folder.
            check: raises where the folder, complete but for its name, is not what it should be.

        Returns:
            The whole report.
        """
        report, recipe = self._report, self._recipe
        stored = {row.name: row.entry for row in report.linears if row.format != Dense.FORMAT}
        saved = sum(row.dense_bytes - row.bytes for row in report.linears)
        report.output_bytes = report.input_bytes - saved
        seconds = [record["seconds"] for record in self._journal.blocks]
        report.run = {**run, "block_seconds": seconds}
        files = {"report.json": to_json(report.facts()), "recipe.toml": recipe.to_toml()}
        if recipe.plan or report.allocation:
            files[plan_file.FILE] = plan_file.dumps(self._plan)
        config = compressed_config(self._writer.reader.config, stored)
        self._writer.complete(config, files, code=recipe.trust_remote_code)
        check(self._writer.folder)
        return self._journal.publish(to_json(report.everything()))

    def publish(self) -> dict[str, Any]:
        """Give the folder of a `complete` run its name. Returns its report."""
        return self._journal.publish()


@contextmanager
def recording(
    output: Path, fingerprint: Mapping[str, Any], settings: Mapping[str, Any], *, first: bool
) -> Iterator[Recorder | NullRecorder]:
    """The recorder of this process; arguments as for `Journal`."""
    if not first:
        yield NullRecorder()
        return
    with Journal(output, fingerprint, settings) as journal:
        yield Recorder(journal)


class _SharedTensors:
    """Tensors on disk that hold the matrices of all experts, until the last of these has come."""

    def __init__(self, plan: Plan) -> None:
        self._reader: Reader = plan.reader
        self._waiting = Counter(task.linear.tensor for task in plan.every)
        self._tensors: dict[str, Tensor] = {}

    def is_last(self, task: Task) -> bool:
        """Whether no other matrix of the task's tensor on disk is to come. Asked once of each."""
        self._waiting[task.linear.tensor] -= 1
        return not self._waiting[task.linear.tensor]

    def filled(self, task: Task, weight: Tensor, last: bool) -> Tensor | None:
        """The task's tensor on disk with `weight` in its place, after the `last` one; None while
        others are to come.
        """
        linear = task.linear
        if linear.tensor not in self._tensors:
            self._tensors[linear.tensor] = self._reader.read(linear.tensor)
        self._tensors[linear.tensor][linear.at] = weight
        return self._tensors.pop(linear.tensor) if last else None


def _why_not_packed(plan: Plan, task: Task, form: Form) -> str:
    """Why zeros are in place where a packed form was asked for; empty if they are not."""
    if not plan.packed or not isinstance(form, Dense) or not task.fits_2_4:
        return ""
    return "zeros in place: other experts of the block are not packed"


def _pattern(task: Task, form: Form) -> str:
    """The n:m of a linear, empty where it has none: a product of factors has no zeros."""
    pattern = task.target
    if not isinstance(pattern, Pattern) or not pattern.m:
        return ""
    return str(pattern) if form.sparsity >= float(pattern.sparsity) else ""


def _finite(losses: tuple[float, float] | None) -> tuple[tuple[float, float] | None, str]:
    """The losses and nothing; None and a note where they are not finite."""
    if losses is None or all(map(math.isfinite, losses)):
        return losses, ""
    return None, "the losses of its method overflowed"

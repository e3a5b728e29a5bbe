"""Checkpoint in, compressed checkpoint out. The only file that knows the order of things.

Check everything cheap, calibrate, go through the blocks and write each linear as it is finished,
write the rest, report.
"""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from compressor.allocation.rank import Spectrum
from compressor.allocation.rank import choose as ranks
from compressor.allocation.sparsity.choose import allocate
from compressor.calibration import capture, tokens
from compressor.calibration.capture import States, batch_size
from compressor.calibration.hidden_states import Batches
from compressor.checkpoint.packed_config import compressed_config, module_entry
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.work_state import work_path
from compressor.checkpoint.writer import Writer, side_files
from compressor.config.recipe import Recipe
from compressor.engine.blocks import Seen, Store, compress_blocks
from compressor.engine.distributed import Group, local_device, processes
from compressor.engine.memory import choose_home, gram_room, parse_size
from compressor.engine.task import Job, Task
from compressor.errors import DataError, UsageError
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.model.skeleton import WEIGHT_DTYPES
from compressor.pattern import Pattern
from compressor.progress import Progress, silent
from compressor.records.report import BlockRow, LinearRow, Report, peak_memory
from compressor.run import plan_file
from compressor.run.check import make_job
from compressor.run.fingerprint import fingerprint
from compressor.run.journal import Journal


def prune(
    recipe: Recipe,
    output: Path,
    *,
    device: str = "auto",
    max_memory: str = "",
    progress: Progress = silent,
) -> Report:
    """Compress `recipe.model` into the new folder `output`; beside it, `<output>.report.json` gets
    the cost of this run.

    A run that was cut off (a kill, an interruption, a full disk) goes on where it was when the same
    is asked for again. Processes that torchrun started share the work; each of them calls this.

    Raises:
        CompressError: for everything a user can cause; nothing is left behind but what a run can go
            on from.
    """
    if max_memory:
        parse_size(max_memory)
    with processes() as group:
        where = choose_device(local_device(device))
        job = make_job(recipe, output)
        if job.tune and group.size > 1:
            raise UsageError(
                "--tune trains on all samples at once, in one process: start it without torchrun"
            )
        recipe = replace(recipe, seq_len=job.seq_len, **job.checked_options)
        settings = {
            "recipe": asdict(recipe),
            "device": device,
            "max_memory": max_memory,
            "folder": os.getcwd(),
        }
        others = side_files(job.reader.folder, code=recipe.trust_remote_code)
        mark = fingerprint(recipe, job.reader, others, where, group.size)
        with Journal(output, mark, settings) if group.first else nullcontext() as journal:
            if group.agreed(lambda: journal and journal.complete):
                return Report.load(group.agreed(lambda: journal and journal.publish()))
            return _prune(job, recipe, output, where, max_memory, journal, group, progress)


def _prune(
    job: Job,
    recipe: Recipe,
    output: Path,
    device: torch.device,
    max_memory: str,
    journal: Journal | None,
    group: Group,
    progress: Progress,
) -> Report:
    """What is not done yet; the first process has the journal, writes and reports."""
    started, work, reader = time.perf_counter(), work_path(output), job.reader
    recipe = replace(recipe, plan=plan_file.FILE if recipe.plan else "")
    report = Report(
        asdict(recipe), job.skeleton.config.model_type, _parameters(reader), reader.nbytes
    )
    states = (
        _calibrate(job, recipe, device, max_memory, work, journal, group, progress)
        if job.needs_inputs
        else None
    )
    job = replace(job, gram_room=gram_room(job, device, max_memory) if job.needs_gram else None)
    factored, spectra = group.agreed(ranks.with_gradients, job, states, device, work, progress)
    job = replace(job, factored=factored)
    job = _allocate(job, states, spectra, device, journal, group, progress)
    report.left_dense, report.allocation, report.spectra = (
        job.left_dense,
        job.allocation,
        job.spectra,
    )
    report.calibration_tokens = recipe.num_samples * job.seq_len if states else 0
    writer = (
        Writer(reader, output, {task.linear.tensor for task in job.every}, work)
        if journal
        else None
    )
    done, saved = group.agreed(_restore, journal, writer, report)
    mine = saved[group.rank if job.splits_batches else 0] if saved else None
    if states and mine:  # nothing is saved after the last block
        states.load(work, mine)
    begun, spent = time.perf_counter(), 0.0
    progress("blocks", done, len(job.tasks))
    for row in compress_blocks(
        job, states, device, _storing(job, writer, report), progress, first=done, group=group
    ):
        computed = time.perf_counter()
        saves = row.index + 1 < len(job.tasks) and (group.first or job.splits_batches)
        saved = group.joined([states.save(work) if states and saves else None])
        group.agreed(_record, journal, writer, report, row, computed - begun, saved)
        if states:
            states.forget(work)
        progress("blocks", row.index + 1, len(job.tasks), row)
        begun = time.perf_counter()
        spent += begun - computed
    peak = group.joined([peak_memory()])
    report.run = {
        "device": str(device), "processes": group.size,
        "seconds": round(time.perf_counter() - started, 3),
        "journal_seconds": round(spent, 3), "resumed_at_block": done,
        "peak_memory": {name: max(own.get(name, 0) for own in peak) for name in peak[0]},
    }  # fmt: skip
    return Report.load(group.agreed(_publish, journal, writer, report, job, recipe))


def _restore(
    journal: Journal | None, writer: Writer | None, report: Report
) -> tuple[int, list[Any] | None]:
    """Take up what the journal has; gives how many blocks are done, and what each process saved of
    the hidden states.
    """
    assert journal
    assert writer
    for record in journal.blocks:
        report.linears += [LinearRow(**row) for row in record["linears"]]
        report.blocks.append(BlockRow(**record["block"]))
    writer.restore(record["written"] for record in journal.blocks)
    return len(journal.blocks), journal.blocks[-1]["hidden"] if journal.blocks else None


def _record(
    journal: Journal | None,
    writer: Writer | None,
    report: Report,
    row: BlockRow,
    seconds: float,
    hidden: list[Any],
) -> None:
    """Note a finished block, once everything it wrote is on disk."""
    assert journal
    assert writer
    report.blocks.append(row)
    reported = sum(len(record["linears"]) for record in journal.blocks)
    linears = [asdict(one) for one in report.linears[reported:]]
    facts = {"block": asdict(row), "linears": linears, "written": writer.news(), "hidden": hidden}
    journal.record({**facts, "seconds": round(seconds, 3)})
    writer.forget()


def _publish(
    journal: Journal | None, writer: Writer | None, report: Report, job: Job, recipe: Recipe
) -> dict[str, Any]:
    """Write what is left to write, and give the folder its name; returns the whole report."""
    assert journal
    assert writer
    stored = {row.name: row.entry for row in report.linears if row.format != Dense.FORMAT}
    report.output_bytes = report.input_bytes - sum(
        row.dense_bytes - row.bytes for row in report.linears
    )
    report.run["block_seconds"] = [record["seconds"] for record in journal.blocks]
    files = {"report.json": _json(report.facts()), "recipe.toml": recipe.to_toml()}
    if recipe.plan or job.allocation:
        files[plan_file.FILE] = plan_file.dumps(job)
    writer.complete(
        compressed_config(writer.reader.config, stored), files, code=recipe.trust_remote_code
    )
    return journal.publish(_json(report.everything()))


def _allocate(
    job: Job,
    states: States | None,
    spectra: dict[str, Spectrum] | None,
    device: torch.device,
    journal: Journal | None,
    group: Group,
    progress: Progress,
) -> Job:
    """The job with goals of their own for its linears, where that was asked for; chosen once, a run
    that goes on keeps them.
    """
    if not (job.ratios or job.dense_fraction or job.keep):
        return job

    def choose() -> dict[str, Any]:
        found, known = (
            _chosen(job, states, spectra, device, progress),
            {left.name for left in job.left_dense},
        )
        reasons = [left.reason for left in found.left_dense if left.name not in known]
        facts = {"allocation": found.allocation, "spectra": found.spectra}
        return {"plan": plan_file.dumps(found), "reason": reasons[0] if reasons else "", **facts}

    chosen = group.agreed(lambda: journal and journal.once("goals", choose))
    entries, dense = (
        tomllib.loads(chosen["plan"])["linears"],
        {left.name: left.reason for left in job.left_dense},
    )
    goals = plan_file.fit(entries, [task.linear for task in job.every], dense)
    return replace(
        job.assign(goals, chosen["reason"]),
        allocation=chosen["allocation"],
        spectra=chosen["spectra"],
    )


def _chosen(
    job: Job,
    states: States | None,
    spectra: dict[str, Spectrum] | None,
    device: torch.device,
    progress: Progress,
) -> Job:
    return (
        ranks.allocate(job, states, spectra, device, progress)
        if job.keep
        else allocate(job, states, device, progress)
    )


def make_plan(recipe: Recipe, *, device: str = "auto", progress: Progress = silent) -> Job:
    """What `prune` would do with `recipe`: the job with the goal of every linear. Nothing is
    written.
    """
    where = choose_device(device)
    job = make_job(recipe, None)
    if not (job.ratios or job.dense_fraction or job.shares_by_spectra):
        return _chosen(
            job, None, None, where, progress
        )  # what the method itself needs is not needed for that
    states = calibrate(job, recipe, where, progress) if job.measures else None
    with TemporaryDirectory() as folder:
        factored, spectra = ranks.with_gradients(job, states, where, Path(folder), progress)
        return _chosen(replace(job, factored=factored), states, spectra, where, progress)


def calibrate(
    job: Job, recipe: Recipe, device: torch.device, progress: Progress = silent
) -> States:
    """The calibration on entering block 0, all of it on `device`."""
    progress("calibration", 0, 1)
    states = capture.capture(job.skeleton, _samples(job, recipe, device), device)
    progress("calibration", 1, 1)
    return states


def _storing(job: Job, writer: Writer | None, report: Report) -> Store:
    """Write each linear and report on it."""
    together: dict[
        str, Tensor
    ] = {}  # tensors that hold the matrices of all experts, until the last has come
    waiting = Counter(task.linear.tensor for task in job.every)

    def store(task: Task, form: Form, seen: Seen | None) -> None:
        assert writer
        linear = task.linear
        stored = (
            {"weight": form.dense().T}
            if isinstance(form, Dense) and linear.transposed
            else form.pack()
        )
        waiting[linear.tensor] -= 1
        if linear.at is None:
            writer.replace(linear.tensor, stored)
        else:
            if linear.tensor not in together:
                together[linear.tensor] = job.reader.read(linear.tensor)
            together[linear.tensor][linear.at] = stored["weight"]
            if not waiting[linear.tensor]:
                writer.replace(
                    linear.tensor, {linear.tensor.rpartition(".")[2]: together.pop(linear.tensor)}
                )
        notes = [getattr(form, "note", ""), seen.note if seen else ""]
        if job.packed and isinstance(form, Dense) and job.fits_2_4(task):
            shared = (
                "all experts share one tensor"
                if linear.at is not None
                else "other experts of the block are not packed"
            )
            notes.append(f"zeros in place: {shared}")
        report.linears.append(
            LinearRow(
                name=linear.name,
                shape=list(linear.shape),
                format=form.FORMAT,
                sparsity=form.sparsity,
                error=seen.error if seen else None,
                dense_bytes=linear.size
                * WEIGHT_DTYPES[job.reader.tensors[linear.tensor].dtype].itemsize,
                bytes=sum(tensor.nbytes for tensor in stored.values()),
                entry=module_entry(form.entry, transposed=linear.transposed),
                tokens=seen.tokens if seen else None,
                note="; ".join(note for note in notes if note),
                losses=getattr(form, "losses", None),
                pattern=str(task.goal) if isinstance(task.goal, Pattern) and task.goal.m else "",
            )
        )

    return store


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def choose_device(device: str) -> torch.device:
    """The torch device named `device`; `auto` is the first CUDA device, or the CPU. Raises
    UsageError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {device!r} cannot be used: "
            f"{str(error).splitlines()[0].partition('. ')[0][:200]}"
        ) from None
    return chosen


def _parameters(reader: Reader) -> int:
    return sum(torch.Size(entry.shape).numel() for entry in reader.tensors.values())


def _calibrate(
    job: Job,
    recipe: Recipe,
    device: torch.device,
    max_memory: str,
    work: Path,
    journal: Journal | None,
    group: Group,
    progress: Progress,
) -> States:
    """Token samples, and their hidden states entering block 0: of all batches, or of this process's
    part of them.
    """
    progress("calibration", 0, 1)
    ids = torch.tensor(
        group.agreed(
            lambda: journal and journal.once("ids", lambda: _samples(job, recipe, device).tolist())
        )
    )
    size = batch_size(*ids.shape)
    part = group.part(len(ids) // size) if job.splits_batches else slice(0, len(ids) // size)
    home = choose_home(job, (part.stop - part.start) * size * job.seq_len, device, max_memory, work)
    states = capture.capture(
        job.skeleton, ids, device, Batches(device, home, f"hidden.{group.rank}"), part
    )
    if job.tune:
        states.dense = Batches(device, home, f"dense.{group.rank}")
        for hidden in states.hidden:
            states.dense.append(hidden)
    progress("calibration", 1, 1)
    return states


def _samples(job: Job, recipe: Recipe, device: torch.device) -> Tensor:
    """Token ids of the calibration, `[num_samples, seq_len]`."""
    folder, asked = (
        job.reader.folder,
        {"num_samples": recipe.num_samples, "seq_len": job.seq_len, "seed": recipe.seed},
    )
    if recipe.dataset == "self":
        ids = tokens.sample_from_model(
            folder, **asked, device=str(device), trust_remote_code=recipe.trust_remote_code
        )
    else:
        vocabulary = job.skeleton.config.get_text_config().vocab_size
        ids = tokens.calibration_rows(
            recipe.dataset,
            folder,
            vocabulary,
            **asked,
            text_column=recipe.text_column,
            trust_remote_code=recipe.trust_remote_code,
        )
    if ids.shape != (recipe.num_samples, job.seq_len):
        raise DataError(
            f"calibration has shape {list(ids.shape)}, {[recipe.num_samples, job.seq_len]} was "
            f"asked for"
        )
    return ids

"""Checkpoint in, compressed checkpoint out. The only file that knows the order of things.

Check everything cheap, calibrate, go through the blocks and write each linear as it is finished, write the rest, report.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import calibration, data, plan
from compressor.allocation import allocate
from compressor.blocks import Progress, Store, compress_blocks, silent
from compressor.checkpoint import Reader
from compressor.errors import DataError, UsageError
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.job import Job, Task, make_job
from compressor.layout import compressed_config, module_entry
from compressor.recipe import Recipe
from compressor.report import LinearRow, Report, peak_memory
from compressor.stats import InputStats, output_error
from compressor.writer import Writer, report_path


def prune(recipe: Recipe, output: Path, *, device: str = "auto", progress: Progress = silent) -> Report:
    """Compress `recipe.model` into the new folder `output`; beside it, `<output>.report.json` gets the cost of this run.

    Raises:
        CompressError: for everything a user can cause; nothing is left behind.
    """
    started = time.perf_counter()
    where = choose_device(device)
    job = make_job(recipe, output)
    recipe = replace(recipe, seq_len=job.seq_len, plan=plan.FILE if recipe.plan else "")
    reader = job.reader
    report = Report(asdict(recipe), job.skeleton.config.model_type, _parameters(reader), reader.nbytes)
    states = _calibrate(job, recipe, where, progress) if job.needs_inputs else None
    job = allocate(job, states, where, progress)
    report.left_dense, report.allocation = job.left_dense, job.allocation
    report.calibration_tokens = recipe.num_samples * job.seq_len if states else 0
    seconds, begun = [], time.perf_counter()
    with Writer(reader, output, {task.linear.tensor for task in job.every}) as writer:
        for row in compress_blocks(job, states, where, _storing(job, writer, report), progress):
            report.blocks.append(row)
            progress("blocks", row.index + 1, len(job.tasks), row)
            seconds.append(round(time.perf_counter() - begun, 3))
            begun = time.perf_counter()
        stored = {row.name: row.entry for row in report.linears if row.format != Dense.FORMAT}
        report.output_bytes = report.input_bytes - sum(row.dense_bytes - row.bytes for row in report.linears)
        files = {"report.json": _json(report.facts()), "recipe.toml": recipe.to_toml()}
        if recipe.plan or job.allocation:
            files[plan.FILE] = plan.dumps(job)
        writer.finish(compressed_config(reader.config, stored), files, code=recipe.trust_remote_code)
    total = round(time.perf_counter() - started, 3)
    report.run = {"device": str(where), "seconds": total, "block_seconds": seconds, "peak_memory": peak_memory()}
    report_path(output).write_text(_json(report.everything()))
    return report


def make_plan(recipe: Recipe, *, device: str = "auto", progress: Progress = silent) -> Job:
    """What `prune` would do with `recipe`: the job with the goal of every linear. Nothing is written."""
    where = choose_device(device)
    job = make_job(recipe, None)
    states = _calibrate(job, recipe, where, progress) if job.measures else None
    return allocate(job, states, where, progress)


def _storing(job: Job, writer: Writer, report: Report) -> Store:
    """Write each linear and report on it."""
    together: dict[str, Tensor] = {}  # tensors that hold the matrices of all experts, until the last has come
    waiting = Counter(task.linear.tensor for task in job.every)

    def store(task: Task, weight: Tensor, form: Form, stats: InputStats | None) -> None:
        linear, dense = task.linear, form.dense()
        stored = {"weight": dense.T} if isinstance(form, Dense) and linear.transposed else form.pack()
        waiting[linear.tensor] -= 1
        if linear.at is None:
            writer.replace(linear.tensor, stored)
        else:
            if linear.tensor not in together:
                together[linear.tensor] = job.reader.read(linear.tensor)
            together[linear.tensor][linear.at] = stored["weight"]
            if not waiting[linear.tensor]:
                writer.replace(linear.tensor, {linear.tensor.rpartition(".")[2]: together.pop(linear.tensor)})
        notes = [stats.note if stats else ""]
        if job.packed and isinstance(form, Dense) and job.fits_2_4(task):
            shared = "all experts share one tensor" if linear.at is not None else "other experts of the block are not packed"
            notes.append(f"zeros in place: {shared}")
        report.linears.append(
            LinearRow(
                name=linear.name,
                shape=list(linear.shape),
                format=form.FORMAT,
                sparsity=form.sparsity,
                error=output_error(weight, dense, stats) if stats else None,
                dense_bytes=weight.nbytes,
                bytes=sum(tensor.nbytes for tensor in stored.values()),
                entry=module_entry(form.entry, transposed=linear.transposed),
                tokens=stats.tokens if stats else None,
                note="; ".join(note for note in notes if note),
            )
        )

    return store


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def choose_device(device: str) -> torch.device:
    """The torch device named `device`; `auto` is the first CUDA device, or the CPU. Raises UsageError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return chosen


def _parameters(reader: Reader) -> int:
    return sum(torch.Size(entry.shape).numel() for entry in reader.tensors.values())


def _calibrate(job: Job, recipe: Recipe, device: torch.device, progress: Progress) -> calibration.States:
    """Token samples, and their hidden states entering block 0."""
    folder, asked = job.reader.folder, {"num_samples": recipe.num_samples, "seq_len": job.seq_len, "seed": recipe.seed}
    progress("calibration", 0, 1)
    if recipe.dataset == "self":
        ids = data.sample_from_model(folder, **asked, device=str(device), trust_remote_code=recipe.trust_remote_code)
    else:
        vocabulary = job.skeleton.config.get_text_config().vocab_size
        ids = data.calibration_rows(recipe.dataset, folder, vocabulary, **asked, trust_remote_code=recipe.trust_remote_code)
    if ids.shape != (recipe.num_samples, job.seq_len):
        raise DataError(f"calibration has shape {list(ids.shape)}, {[recipe.num_samples, job.seq_len]} was asked for")
    states = calibration.capture(job.skeleton, ids, device)
    states.dense = list(states.hidden) if job.tune else []
    progress("calibration", 1, 1)
    return states

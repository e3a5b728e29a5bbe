"""Checkpoint in, compressed checkpoint out. The only file that knows the order of things.

Check everything cheap, calibrate, go through the blocks and write each linear as it is finished, write the rest, report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import calibration, data
from compressor.blocks import Progress, Store, compress_blocks, silent
from compressor.checkpoint import Reader
from compressor.errors import DataError, UsageError
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.job import Job, Task, make_job
from compressor.layout import compressed_config
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
    recipe = replace(recipe, seq_len=job.seq_len)
    reader = job.reader
    report = Report(asdict(recipe), job.skeleton.config.model_type, _parameters(reader), reader.nbytes, left_dense=job.left_dense)
    states = _calibrate(job, recipe, where, progress) if job.needs_inputs else None
    report.calibration_tokens = recipe.num_samples * job.seq_len if states else 0
    seconds, begun = [], time.perf_counter()
    progress("blocks", 0, len(job.tasks))
    with Writer(reader, output, {task.linear.tensor for task in job.every}) as writer:
        for row in compress_blocks(job, states, where, _storing(writer, report), progress):
            report.blocks.append(row)
            progress("blocks", row.index + 1, len(job.tasks), row)
            seconds.append(round(time.perf_counter() - begun, 3))
            begun = time.perf_counter()
        stored = {row.name: row.entry for row in report.linears if row.format != Dense.FORMAT}
        report.output_bytes = report.input_bytes - sum(row.dense_bytes - row.bytes for row in report.linears)
        files = {"report.json": _json(report.facts()), "recipe.toml": recipe.to_toml()}
        writer.finish(compressed_config(reader.config, stored), files, code=recipe.trust_remote_code)
    total = round(time.perf_counter() - started, 3)
    report.run = {"device": str(where), "seconds": total, "block_seconds": seconds, "peak_memory": peak_memory()}
    report_path(output).write_text(_json(report.everything()))
    return report


def _storing(writer: Writer, report: Report) -> Store:
    """Write each linear and report on it."""

    def store(task: Task, weight: Tensor, form: Form, stats: InputStats | None) -> None:
        linear, dense = task.linear, form.dense()
        packed = {"weight": dense.T} if isinstance(form, Dense) and linear.transposed else form.pack()
        writer.replace(linear.tensor, packed)
        report.linears.append(
            LinearRow(
                name=linear.name,
                shape=list(linear.shape),
                format=form.FORMAT,
                sparsity=form.sparsity,
                error=output_error(weight, dense, stats) if stats else None,
                dense_bytes=weight.nbytes,
                bytes=sum(tensor.nbytes for tensor in packed.values()),
                entry=form.entry,
                notes=getattr(form, "notes", {}),
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

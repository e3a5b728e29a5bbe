"""The per-block loop: checkpoint in, compressed checkpoint out. The only file that knows the order of things.

For each block: load it, run the calibration states through it and collect statistics, compress its linears, tune it if asked,
write it, run the states through the compressed block to get the inputs of the next, free it.
Peak memory is one block, the calibration states and the statistics of one block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor import calibration, data
from compressor.checkpoint import Reader
from compressor.errors import DataError, NumericalError, UsageError
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.formats.sparse24 import Sparse24
from compressor.layout import compressed_config
from compressor.model import Linear
from compressor.plan import Plan, make_plan
from compressor.recipe import Recipe
from compressor.refine.tune import tune
from compressor.report import BlockRow, LinearRow, Report, peak_memory
from compressor.stats import InputStats, collecting, output_error
from compressor.writer import Writer, report_path

_ERROR_BATCHES = 4  # batches whose dense outputs are kept to measure the error of a block


class Progress(Protocol):
    """Told after each step: its name, how many are done of how many, and the block's result once there is one."""

    def __call__(self, step: str, done: int, total: int, block: BlockRow | None = None) -> None:
        """Called after each step."""
        ...


def silent(step: str, done: int, total: int, block: BlockRow | None = None) -> None:
    """A Progress that says nothing."""


@dataclass(frozen=True)
class Run:
    """What the steps of the loop share. `states` is None where no calibration is needed."""

    plan: Plan
    recipe: Recipe
    device: torch.device
    states: calibration.States | None
    writer: Writer
    report: Report
    progress: Progress


def prune(recipe: Recipe, output: Path, *, device: str = "auto", progress: Progress = silent) -> Report:
    """Compress `recipe.model` into the new folder `output`; beside it, `<output>.report.json` gets the cost of this run.

    Raises:
        CompressError: for everything a user can cause; nothing is left behind.
    """
    started = time.perf_counter()
    where = choose_device(device)
    plan = make_plan(recipe, output)
    recipe = replace(recipe, seq_len=plan.seq_len)
    reader = plan.reader
    report = Report(asdict(recipe), plan.skeleton.config.model_type, _parameters(reader), reader.nbytes, left_dense=plan.left_dense)
    states = _calibrate(plan, recipe, where, progress) if plan.needs_inputs else None
    report.calibration_tokens = recipe.num_samples * plan.seq_len if states else 0
    replaced = {linear.tensor for block in plan.blocks for linear in block}
    seconds = []
    with Writer(reader, output, replaced) as writer:
        run = Run(plan, recipe, where, states, writer, report, progress)
        for index in range(len(plan.blocks)):
            begun = time.perf_counter()
            report.blocks.append(BlockRow(index, _prune_block(run, index)))
            seconds.append(round(time.perf_counter() - begun, 3))
            progress("blocks", index + 1, len(plan.blocks), report.blocks[-1])
        stored = {row.name: row.entry for row in report.linears if row.format != Dense.FORMAT}
        report.output_bytes = report.input_bytes - sum(row.dense_bytes - row.bytes for row in report.linears)
        files = {"report.json": _json(report.facts()), "recipe.toml": recipe.to_toml()}
        writer.finish(compressed_config(reader.config, stored), files, code=recipe.trust_remote_code)
    total = round(time.perf_counter() - started, 3)
    report.run = {"device": str(where), "seconds": total, "block_seconds": seconds, "peak_memory": peak_memory()}
    report_path(output).write_text(_json(report.everything()))
    return report


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


def _calibrate(plan: Plan, recipe: Recipe, device: torch.device, progress: Progress) -> calibration.States:
    """Token samples, and their hidden states entering block 0."""
    folder, asked = plan.reader.folder, {"num_samples": recipe.num_samples, "seq_len": plan.seq_len, "seed": recipe.seed}
    progress("calibration", 0, 1)
    if recipe.dataset == "self":
        ids = data.sample_from_model(folder, **asked, device=str(device), trust_remote_code=recipe.trust_remote_code)
    else:
        vocabulary = plan.skeleton.config.get_text_config().vocab_size
        ids = data.calibration_rows(recipe.dataset, folder, vocabulary, **asked, trust_remote_code=recipe.trust_remote_code)
    if ids.shape != (recipe.num_samples, plan.seq_len):
        raise DataError(f"calibration has shape {list(ids.shape)}, {[recipe.num_samples, plan.seq_len]} was asked for")
    states = calibration.capture(plan.skeleton, ids, device)
    states.dense = list(states.hidden) if plan.tune else []
    progress("calibration", 1, 1)
    return states


def _prune_block(run: Run, index: int) -> float | None:
    """Compress one block; returns the relative squared error of its output, None without calibration."""
    plan, states = run.plan, run.states
    block = plan.skeleton.load_block(index, run.device)
    linears = plan.blocks[index]
    arguments = states.arguments[index] if states else ((), {})
    exact: list[Tensor] = []
    hooked = collecting({linear.name: linear.module for linear in linears}, gram=plan.needs_gram) if states else nullcontext({})
    with hooked as stats:
        for number, hidden in enumerate(states.hidden if states else []):
            output = calibration.run(block, hidden, arguments)
            if number < _ERROR_BATCHES:
                exact.append(output)
    if states and plan.tune:  # what the dense model makes of its own hidden states: the target of the tuning
        states.dense = [calibration.run(block, hidden, arguments) for hidden in states.dense]
    for number, linear in enumerate(linears):
        weight, own = linear.read(plan.reader).to(run.device), stats.get(linear.name)
        form = _compress(plan, linear, weight, own)
        linear.set(form.dense())
        if not plan.tune:
            _store(run, linear, weight, form, own)
        run.progress("linears", number + 1, len(linears))
    if states and plan.tune:
        _tune(run, index, block, arguments, stats)
    error = _advance(block, states, arguments, exact) if states else None
    plan.skeleton.free_block(index)
    return error


def _compress(plan: Plan, linear: Linear, weight: Tensor, stats: InputStats | None) -> Form:
    """The form of `weight` `[out, in]`, refined if asked."""
    if plan.needs_inputs:
        (stats or InputStats(1)).check(linear.name)
    try:
        form: Form = plan.method.compress(weight, stats, plan.pattern, **plan.options)
        if plan.refine:
            form = Dense(plan.refine.refine(weight, form.dense(), stats, plan.pattern, **plan.refine_options))
    except NumericalError as error:
        raise NumericalError(f"{linear.name}: {error}") from None
    return form


def _store(run: Run, linear: Linear, weight: Tensor, form: Form, stats: InputStats | None) -> None:
    """Write one linear, packed where it can be, compute with what was written, and report on it."""
    if run.recipe.format == "packed" and isinstance(form, Dense) and run.plan.pattern.fits_2_4:
        form = Sparse24.from_dense(form.weight)
    dense = form.dense()
    packed = {"weight": dense.T} if isinstance(form, Dense) and linear.transposed else form.pack()
    run.writer.replace(linear.tensor, packed)
    linear.set(dense)
    run.report.linears.append(
        LinearRow(
            name=linear.name,
            shape=list(linear.shape),
            format=form.FORMAT,
            sparsity=form.sparsity,
            error=output_error(weight, dense, stats) if stats else None,
            dense_bytes=weight.nbytes,
            bytes=sum(tensor.nbytes for tensor in packed.values()),
            entry=form.entry,
        )
    )


def _tune(run: Run, index: int, block: torch.nn.Module, arguments: Any, stats: Mapping[str, InputStats]) -> None:
    """Train the kept weights of a block, then store its linears as they are now."""
    assert run.states is not None
    linears = run.plan.blocks[index]
    weights = {linear.name: linear.module.weight for linear in linears}
    tune(block, weights, run.states.hidden, run.states.dense, arguments, epochs=run.plan.tune, seed=run.recipe.seed)
    for linear in linears:
        weight = linear.read(run.plan.reader).to(run.device)
        tuned = linear.get().to(weight.dtype)
        _store(run, linear, weight, Dense(tuned), stats.get(linear.name))


def _advance(block: torch.nn.Module, states: calibration.States, arguments: Any, exact: list[Tensor]) -> float:
    """Run the states through the compressed block, in place; returns the error against the `exact` outputs."""
    difference = total = 0.0
    for number, hidden in enumerate(states.hidden):
        output = calibration.run(block, hidden, arguments)
        if number < len(exact):
            difference += (output - exact[number]).double().square().sum().item()
            total += exact[number].double().square().sum().item()
        states.hidden[number] = output
    return difference / max(total, 1e-300)

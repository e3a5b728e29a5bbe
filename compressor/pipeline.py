"""The per-block loop: checkpoint in, compressed checkpoint out. The only file that knows the order of things.

For each block: load it, run the calibration states through it and collect statistics, compress its linears, write them,
run the states through the compressed block to get the inputs of the next, free it.
Peak memory is one block, the calibration states and the statistics of one block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor import calibration, data
from compressor.checkpoint import Reader, resolve
from compressor.errors import CheckpointError, DataError, UsageError
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.formats.sparse24 import Sparse24
from compressor.layout import compressed_config
from compressor.methods import method_module
from compressor.model import WEIGHT_DTYPES, Linear, Skeleton
from compressor.pattern import Pattern
from compressor.recipe import Recipe, check_options
from compressor.refine import refinement
from compressor.report import BlockRow, LeftDense, LinearRow, Report, peak_memory
from compressor.stats import InputStats, collecting, output_error
from compressor.writer import Writer, check_output

_ERROR_BATCHES = 4  # batches whose dense outputs are kept to measure the error of a block


class Progress(Protocol):
    """Told after each step: its name, how many are done of how many, and the block's result once there is one."""

    def __call__(self, step: str, done: int, total: int, block: BlockRow | None = None) -> None:
        """Called after each step."""
        ...


def silent(step: str, done: int, total: int, block: BlockRow | None = None) -> None:
    """A Progress that says nothing."""


@dataclass(frozen=True)
class Plan:
    """What will be done, checked before any work.

    Attributes:
        blocks: the linears to compress, per block.
        left_dense: every other weight with two dimensions or more, and why.
    """

    reader: Reader
    skeleton: Skeleton
    method: ModuleType
    options: dict[str, Any]
    refine: ModuleType | None
    refine_options: dict[str, Any]
    pattern: Pattern
    seq_len: int
    blocks: list[list[Linear]]
    left_dense: list[LeftDense]

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration is needed at all."""
        return self.method.NEEDS_INPUTS or self.refine is not None

    @property
    def needs_gram(self) -> bool:
        """Whether the statistics need the Gram matrix."""
        return self.method.NEEDS_GRAM or (self.refine is not None and self.refine.NEEDS_GRAM)


def make_plan(recipe: Recipe, output: Path | None) -> Plan:
    """Check everything cheap: names, options, output, checkpoint, pattern against every linear, dataset, lengths."""
    pattern = Pattern.parse(recipe.pattern)
    method = method_module(recipe.method)
    options = check_options(f"method {recipe.method}", method.compress, recipe.options)
    refine = refinement(recipe.refine) if recipe.refine else None
    refine_options = check_options(f"refinement {recipe.refine}", refine.refine, recipe.refine_options) if refine else {}
    if refine and not method.REFINABLE:
        raise UsageError(f"--refine {recipe.refine} improves a plain pruned weight, method {recipe.method} stores another form")
    _rehearse(method, options, refine, refine_options, pattern)
    if method.NEEDS_INPUTS or refine:
        data.check_dataset(recipe.dataset)
    reader = Reader(resolve(recipe.model, recipe.revision or None))
    if output is not None:
        check_output(output, reader)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    skeleton = Skeleton(reader, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    seq_len = _sequence_length(recipe.seq_len, data.context_length(skeleton.config))
    blocks, left_dense = _choose(skeleton, recipe.ignore)
    for linear in (linear for block in blocks for linear in block):
        pattern.check_width(linear.name, linear.shape[1])
        if (stored := reader.tensors[linear.tensor].dtype) not in WEIGHT_DTYPES:
            raise CheckpointError(f"{linear.tensor} is stored as {stored}; float32, float16 and bfloat16 can be compressed")
    return Plan(reader, skeleton, method, options, refine, refine_options, pattern, seq_len, blocks, left_dense)


def _rehearse(
    method: ModuleType, options: dict[str, Any], refine: ModuleType | None, refine_options: dict[str, Any], pattern: Pattern
) -> None:
    """Run method and refinement on a tiny weight: what they refuse, they refuse now and not after the calibration."""
    columns = -(-16 // (pattern.m or 1)) * (pattern.m or 1)
    generator = torch.Generator().manual_seed(0)
    stats = InputStats(columns, gram=True)
    stats.update(torch.randn(2 * columns, columns, generator=generator))
    weight = torch.randn(16, columns, generator=generator)
    pruned = method.compress(weight, stats, pattern, **options).dense()
    if refine:
        refine.refine(weight, pruned, stats, pattern, **refine_options)


def _sequence_length(asked: int, limit: int | None) -> int:
    if asked and limit and asked > limit:
        raise UsageError(f"seq-len {asked} is longer than the {limit} tokens this model was made for")
    return asked or min(2048, limit or 2048)


def _choose(skeleton: Skeleton, ignore: list[str]) -> tuple[list[list[Linear]], list[LeftDense]]:
    """Split the weights into those to compress and those left dense, with reasons. Nothing is skipped in silence."""
    blocks: list[list[Linear]] = []
    left: list[LeftDense] = []
    unused = set(ignore)

    def matching(name: str) -> str | None:
        hits = [glob for glob in ignore if fnmatchcase(name, glob)]
        unused.difference_update(hits)
        return hits[0] if hits else None

    for index in range(len(skeleton.blocks)):
        blocks.append([])
        for linear in skeleton.linears(index):
            if glob := matching(linear.name):
                left.append(LeftDense(linear.name, list(linear.shape), f"--ignore {glob}"))
            else:
                blocks[-1].append(linear)
        for name, shape in skeleton.others(index):
            glob = matching(name)
            if len(shape) > 2 and not glob:
                raise CheckpointError(
                    f"{name} has shape {list(shape)}: stacked expert weights are not supported; "
                    f"leave them dense with --ignore '*{name.split('.')[-1]}'"
                )
            left.append(LeftDense(name, list(shape), f"--ignore {glob}" if glob else "not a linear layer"))
    if unused:
        known = blocks[0][0].name if blocks and blocks[0] else "none"
        raise UsageError(f"--ignore {min(unused)!r} matches no linear; names look like {known!r}")
    if not any(blocks):
        raise UsageError("there is nothing to compress: the decoder blocks hold no linears, or all are ignored")
    inside = f"{skeleton.path}."
    for name, tensors in skeleton.on_disk.items():
        for tensor in tensors:
            shape = skeleton.reader.tensors[tensor].shape
            if len(shape) >= 2 and not name.startswith(inside):
                left.append(LeftDense(tensor, list(shape), "outside the decoder blocks"))
    return blocks, left


def prune(recipe: Recipe, output: Path, *, device: str = "auto", progress: Progress = silent) -> Report:
    """Compress `recipe.model` into the new folder `output`; beside it, `<output>.report.json` gets the cost of this run.

    Raises:
        CompressError: for everything a user can cause; nothing is left behind.
    """
    started = time.perf_counter()
    where = choose_device(device)
    plan = make_plan(recipe, output)
    report = Report(
        asdict(recipe), plan.skeleton.config.model_type, _parameters(plan.reader), plan.reader.nbytes, left_dense=plan.left_dense
    )
    report.recipe["seq_len"] = plan.seq_len
    states = _calibrate(plan, recipe, where, progress) if plan.needs_inputs else None
    report.calibration_tokens = recipe.num_samples * plan.seq_len if states else 0
    replaced = {linear.tensor for block in plan.blocks for linear in block}
    seconds = []
    with Writer(plan.reader, output, replaced) as writer:
        for index in range(len(plan.blocks)):
            begun = time.perf_counter()
            error = _prune_block(plan, index, states, where, recipe.format, writer, report)
            report.blocks.append(BlockRow(index, error))
            seconds.append(round(time.perf_counter() - begun, 3))
            progress("blocks", index + 1, len(plan.blocks), report.blocks[-1])
        stored = {row.name: row.entry for row in report.linears if row.format != Dense.FORMAT}
        report.output_bytes = report.input_bytes - sum(row.dense_bytes - row.bytes for row in report.linears)
        files = {"report.json": _json(report.facts()), "recipe.toml": recipe.to_toml()}
        writer.finish(compressed_config(plan.reader.config, stored), files, code=recipe.trust_remote_code)
    report.run = {
        "device": str(where),
        "seconds": round(time.perf_counter() - started, 3),
        "block_seconds": seconds,
        "peak_memory": peak_memory(),
    }
    output.with_name(f"{output.name}.report.json").write_text(_json(report.everything()))
    return report


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def choose_device(device: str) -> torch.device:
    """The torch device named `device`; `auto` is the first CUDA device, or the CPU. Raises UsageError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
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
    progress("calibration", 1, 1)
    return states


def _prune_block(
    plan: Plan, index: int, states: calibration.States | None, device: torch.device, how: str, writer: Writer, report: Report
) -> float | None:
    """Compress one block; returns the relative squared error of its output, None without calibration."""
    block = plan.skeleton.load_block(index, device)
    linears = plan.blocks[index]
    arguments = states.arguments[index] if states else ((), {})
    exact: list[Tensor] = []
    hooked = collecting({linear.name: linear.module for linear in linears}, gram=plan.needs_gram) if states else nullcontext({})
    with hooked as stats:
        for number, hidden in enumerate(states.hidden if states else []):
            output = calibration.run(block, hidden, arguments)
            if number < _ERROR_BATCHES:
                exact.append(output)
    for linear in linears:
        _compress_linear(plan, linear, stats, device, how, writer, report)
    error = None
    if states:
        error = _advance(block, states, arguments, exact)
    plan.skeleton.free_block(index)
    return error


def _compress_linear(
    plan: Plan, linear: Linear, stats: Mapping[str, InputStats], device: torch.device, how: str, writer: Writer, report: Report
) -> None:
    """Compress, write and use one linear."""
    weight = linear.read(plan.reader).to(device)
    own = stats.get(linear.name)
    if plan.needs_inputs:
        (own or InputStats(1)).check(linear.name)
    form: Form = plan.method.compress(weight, own, plan.pattern, **plan.options)
    if plan.refine:
        form = Dense(plan.refine.refine(weight, form.dense(), own, plan.pattern, **plan.refine_options))
    if how == "packed" and isinstance(form, Dense) and plan.pattern.fits_2_4:
        form = Sparse24.from_dense(form.weight)
    dense = form.dense()
    packed = {"weight": dense.T} if isinstance(form, Dense) and linear.transposed else form.pack()
    writer.replace(linear.tensor, packed)
    linear.set(dense)
    report.linears.append(
        LinearRow(
            name=linear.name,
            shape=list(linear.shape),
            format=form.FORMAT,
            sparsity=1 - int(torch.count_nonzero(dense)) / dense.numel(),
            error=output_error(weight, dense, own) if own else None,
            dense_bytes=weight.nbytes,
            bytes=sum(tensor.nbytes for tensor in packed.values()),
            entry=form.entry,
        )
    )


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

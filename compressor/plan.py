"""What a run will do, checked before any work: names, options, output, pattern against every linear, dataset, lengths."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compressor import data
from compressor.checkpoint import Reader, resolve
from compressor.errors import CheckpointError, UsageError
from compressor.methods import method_module
from compressor.model import WEIGHT_DTYPES, Linear, Skeleton
from compressor.pattern import Pattern
from compressor.recipe import Recipe, check_options
from compressor.refine import refinement
from compressor.report import LeftDense
from compressor.stats import InputStats
from compressor.writer import check_output


@dataclass(frozen=True)
class Plan:
    """What will be done, checked before any work.

    Attributes:
        method, refine: modules, with their checked options; refine may be None.
        seq_len: tokens of a calibration sample.
        blocks: the linears to compress, per block.
        left_dense: every other weight with two dimensions or more, and why.
        tune: epochs of block tuning, 0 for none.
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
    tune: int

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration is needed at all."""
        return self.method.NEEDS_INPUTS or self.refine is not None or self.tune > 0

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
    if (refine or recipe.tune) and not method.REFINABLE:
        raise UsageError(f"--refine and --tune improve a plain pruned weight; method {recipe.method} stores another form")
    _rehearse(method, options, refine, refine_options, pattern)
    if method.NEEDS_INPUTS or refine or recipe.tune:
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
    return Plan(reader, skeleton, method, options, refine, refine_options, pattern, seq_len, blocks, left_dense, recipe.tune)


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
        example = blocks[0][0].name if blocks and blocks[0] else "none"
        raise UsageError(f"--ignore {min(unused)!r} matches no linear; names look like {example!r}")
    if not any(blocks):
        raise UsageError("there is nothing to compress: the decoder blocks hold no linears, or all are ignored")
    left += _outside(skeleton)
    return blocks, left


def _outside(skeleton: Skeleton) -> list[LeftDense]:
    """Matrices on disk that belong to no decoder block of the model."""
    known = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    left = []
    for name, tensors in skeleton.on_disk.items():
        if name.startswith(f"{skeleton.path}.") and name in known:
            continue
        reason = "outside the decoder blocks" if name in known else "not part of the model that config.json describes"
        shapes = {tensor: skeleton.reader.tensors[tensor].shape for tensor in tensors}
        left += [LeftDense(tensor, list(shape), reason) for tensor, shape in shapes.items() if len(shape) >= 2]
    return left

"""The layout in which each packed linear of a loaded model is held: one that kernels compute from,
or the dense matrix.

`packed` always uses the kernels, `dense` unpacks everything, `auto` chooses for each linear: on a
CPU packed where its kernels can be compiled and the weight is large enough to gain, on a GPU packed
unless the shipped table has measured it slower than dense and the memory for the dense weight is
there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.errors import CheckpointError, UsageError
from compressor.model import heap
from compressor_kernels import kernel_config
from compressor_kernels.cpu.build import kernels as cpu_kernels
from compressor_kernels.fused_projections import fuse
from compressor_kernels.layouts import Dense, InTiles, Layout, Stored, kernel_layout
from compressor_kernels.linear import PackedLinear, Sparse24Linear
from compressor_kernels.one_row import take_over
from compressor_kernels.stored_linear import moves_tensors

RUNTIMES = ("auto", "packed", "dense")
# names of linears that read one tensor
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
LARGE = 1 << 22  # bytes of a linear after which memory is returned at once
DECODING = (1, 4, 16)  # rows of x that `auto` looks up
# Weights from which on a CPU a linear is computed packed: faster at one row of x, measured with
# weights in the cache on Zen 4, and large enough to compile kernels for.
SMALLEST = {torch.float32: 1 << 18, torch.float16: 1 << 17, torch.bfloat16: 1 << 16}


def check(runtime: str) -> None:
    """Raise UsageError unless `runtime` is one of RUNTIMES."""
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime is {runtime!r}; accepted: {', '.join(RUNTIMES)}")


def asked_by_environment() -> str:
    """What `COMPRESS_RUNTIME` asks an engine for, which has no such argument: one of RUNTIMES.
    Raises UsageError.
    """
    runtime = os.environ.get("COMPRESS_RUNTIME") or "auto"
    check(runtime)
    return runtime


def place(model: nn.Module, paths: Mapping[str, str], runtime: str) -> dict[str, str]:
    """Choose a layout for every packed linear of `model`; what became of each, by name. Beside
    some that the CPU kernels compute, dense linears use them too where these are faster.

    Args:
        model: with its weights loaded.
        paths: name of each packed linear -> path of its module; they differ for experts.
        runtime: one of RUNTIMES.

    Raises:
        CheckpointError: metadata is damaged.
    """
    chosen = {}
    parents: dict[str, list[str]] = {}
    for name in paths:
        parents.setdefault(name.rpartition(".")[0], []).append(name)
    for parent, names in parents.items():
        for name in names:
            try:
                chosen[name] = _place_one(model.get_submodule(paths[name]), runtime)
            except ValueError as error:
                raise CheckpointError(f"{name} is damaged: {error}") from None
            if _size(model.get_submodule(paths[name])) > LARGE:
                heap.give_back()
        # an expert's matrices are called one by one
        if alone := {name for name in names if name == paths[name]}:
            chosen |= _fuse_children(model, parent, {name: chosen[name] for name in alone})
        heap.give_back()
    if runtime != "dense" and any(_on_cpu_kernels(model.get_submodule(paths[n])) for n in paths):
        take_over(model)
    return chosen


def _on_cpu_kernels(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear) and module.layout is InTiles


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _fuse_children(model: nn.Module, parent: str, chosen: Mapping[str, str]) -> dict[str, str]:
    """Fuse the projections of `parent` that are placed alike; what became of those."""
    told = {}
    for family in FUSED:
        members = [f"{parent}.{child}".lstrip(".") for child in family]
        found = [model.get_submodule(member) for member in members if member in chosen]
        packed = [linear for linear in found if isinstance(linear, Sparse24Linear)]
        if len(packed) == len(members) and fuse(packed):
            together = f"one launch for {', '.join(family)}"
            told |= {member: f"{chosen[member]}; {together}" for member in members}
    return told


def _place_one(module: Any, runtime: str) -> str:
    module.freeze_()
    if moves_tensors(module):
        return "packed, unpacked at every call: accelerate moves its tensors"
    if isinstance(module, PackedLinear):
        layout, how = _choose(module, runtime)
        module.place_(layout)
        return how
    if runtime == "dense" or not module.kernels_run():
        module.unpack_()
        return module.without_kernels
    module.prepare_()
    return "packed"


def _choose(module: PackedLinear, runtime: str) -> tuple[type[Layout], str]:
    """The layout that a core is held in, and how that is told."""
    values = module.weight_values
    if runtime == "dense":
        return Dense, "dense"
    size = f"{module.out_features} x {module.in_features}"
    smallest = SMALLEST.get(values.dtype, 0) if values.device.type == "cpu" else 0
    if runtime == "auto" and 2 * values.numel() < smallest:
        return Dense, f"dense: {size} is too small to gain on a CPU"
    layout = kernel_layout(values)
    if layout is None:
        reason = _no_kernel(values)
        if runtime == "packed":
            return Stored, f"packed, unpacked at every call: {reason}"
        return Dense, f"dense: {reason}"
    if runtime == "auto" and (speedup := _slower(module, values)) is not None:
        return Dense, f"dense: packed measured {speedup:.2f}x"
    return layout, "packed"


def _no_kernel(values: torch.Tensor) -> str:
    """Why none computes from a core with such values; a CPU that lacks its kernels is told of as a
    warning too, once.
    """
    problem = cpu_kernels().problem if values.device.type == "cpu" else None
    if problem is None:
        return f"no kernel for {values.dtype} on {values.device}"
    warnings.warn(f"packed weights are computed dense: {problem}", stacklevel=2)
    return problem


def _slower(module: PackedLinear, weight: torch.Tensor) -> float | None:
    """The best speedup measured at a few rows, if it is below 1 and the dense weight fits into free
    memory thrice.
    """
    rows = (
        kernel_config.measured(
            module.op, weight.device, module.out_features, module.in_features, count
        )
        for count in DECODING
    )
    speedups = [row["speedup"] for row in rows if row is not None and "speedup" in row]
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else 0
    fits = 3 * module.out_features * module.in_features * weight.itemsize < free
    return max(speedups) if speedups and max(speedups) < 1 and fits else None

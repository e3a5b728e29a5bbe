"""How each packed linear of a loaded model computes: from the packed weight on our kernels, or from
the dense one.

`packed` always uses the kernels, `dense` unpacks everything, `auto` chooses for each linear: on the
CPU dense, on a GPU packed unless the shipped table has measured it slower than dense and the memory
for the dense weight is there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.errors import CheckpointError, UsageError
from compressor_kernels import backend, kernel_config
from compressor_kernels.fused_projections import join
from compressor_kernels.linear import ArmorLinear, LowRankLinear, Sparse24Linear

RUNTIMES = ("auto", "packed", "dense")
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)  # names of linears that read one tensor
DECODING = (1, 4, 16)  # rows of x that `auto` looks up


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


def arrange(model: nn.Module, paths: Mapping[str, str], runtime: str) -> dict[str, str]:
    """Prepare or unpack the packed linears of `model`; what became of each, by name.

    Args:
        model: with its weights loaded.
        paths: name of each packed linear -> path of its module; they differ for experts.
        runtime: one of RUNTIMES.

    Raises:
        CheckpointError: metadata is damaged.
    """
    chosen = {}
    for name, path in paths.items():
        try:
            chosen[name] = _arrange_one(model.get_submodule(path), runtime)
        except ValueError as error:
            raise CheckpointError(f"{name} is damaged: {error}") from None
    alone = [
        name for name, path in paths.items() if name == path
    ]  # an expert's matrices are called one by one
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in alone):
        for family in SIBLINGS:
            members = [f"{parent}.{child}".lstrip(".") for child in family]
            found = [model.get_submodule(member) for member in members if member in chosen]
            packed = [linear for linear in found if isinstance(linear, Sparse24Linear)]
            if len(packed) == len(members) and join(packed):
                chosen |= {
                    member: f"{chosen[member]}; one launch for {', '.join(family)}"
                    for member in members
                }
    return chosen


def _arrange_one(module: Any, runtime: str) -> str:
    weight = module.weight_u if isinstance(module, LowRankLinear) else module.weight_values
    if _moved(module, weight):
        return "packed, unpacked at every call: accelerate moves its tensors"
    on_cpu = weight.device.type == "cpu"
    if isinstance(module, LowRankLinear) and (runtime == "dense" or not backend.runs(weight)):
        return "two thin factors, multiplied by torch"
    if runtime == "dense" or (runtime == "auto" and on_cpu):
        module.unpack_()
        return "dense" if not on_cpu else "dense: no kernels on the CPU"
    if not backend.runs(weight):
        if runtime == "packed":
            return "packed, unpacked at every call: no kernel runs here"
        module.unpack_()
        return f"dense: no kernel for {weight.dtype} on {weight.device}"
    if runtime == "auto" and (speedup := _slower(module, weight)) is not None:
        module.unpack_()
        return f"dense: packed measured {speedup:.2f}x"
    module.prepare_()
    return "packed"


def _moved(module: Any, weight: torch.Tensor) -> bool:
    """accelerate brings the tensors from elsewhere for each call."""
    hook = getattr(module, "_hf_hook", None)
    return weight.device.type == "meta" or (hook is not None and getattr(hook, "offload", True))


def _slower(module: Any, weight: torch.Tensor) -> float | None:
    """The best speedup measured at a few rows, if it is below 1 and the dense weight fits into free
    memory thrice.
    """
    op = (
        "armor"
        if isinstance(module, ArmorLinear)
        else "fragments"
        if isinstance(module, Sparse24Linear)
        else None
    )
    if op is None:
        return None
    rows = (
        kernel_config.measured(op, weight.device, module.out_features, module.in_features, count)
        for count in DECODING
    )
    speedups = [row["speedup"] for row in rows if row is not None and "speedup" in row]
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else 0
    fits = 3 * module.out_features * module.in_features * weight.itemsize < free
    return max(speedups) if speedups and max(speedups) < 1 and fits else None

"""What this machine offers and what is missing: versions, devices, kernels, room. Everything is
looked at, nothing is assumed.

No torch at import; each finding is made on its own, so that a broken package is one broken finding
and not the end.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from compressor.checkpoint.cache import cache_folder
from compressor.text import size

NEEDED = ["torch", "transformers", "accelerate", "safetensors", "huggingface-hub"]
OPTIONAL = {
    "triton": "kernels on a GPU",
    "lm-eval": "eval --tasks; pip install 'compress-llm[eval]'",
    "datasets": "data sets of the Hub; pip install 'compress-llm[eval]'",
    "pyarrow": ".parquet files; pip install 'compress-llm[parquet]'",
    "matplotlib": "eval --plot; pip install 'compress-llm[plot]'",
}


@dataclass(frozen=True)
class Finding:
    """`state` is `ok`, `missing` (something optional is not there) or `broken` (compress cannot
    work as it should).
    """

    group: str
    name: str
    state: str
    text: str


def examine(build: bool = False) -> list[Finding]:
    """Everything about this machine, in the order it is shown; with `build` kernels are compiled
    that are not there yet.
    """
    found = _tried("versions", "packages", _packages)
    found += _tried("devices", "torch", _devices)
    found += _tried("kernels", "packed linears", partial(_kernels, build))
    found += _tried("room", "memory", _memory)
    found += _tried("room", "disk", _disks)
    found += _tried("Hub", "account", _hub)
    return found


def _tried(group: str, name: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except Exception as error:  # a broken package may raise anything
        return [Finding(group, name, "broken", _said(error))]


def _packages() -> list[Finding]:
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    wanted = {
        rule.name: rule.specifier for rule in map(Requirement, requires("compress-llm") or [])
    }
    found = [
        Finding(
            "versions",
            "python",
            "ok",
            f"{platform.python_version()} on {platform.platform(terse=True)}",
        )
    ]
    for name in ["compress-llm", *NEEDED, *OPTIONAL]:
        try:
            there = version(name)
            fits = name not in wanted or wanted[name].contains(
                there.partition("+")[0], prereleases=True
            )
            found.append(
                Finding(
                    "versions",
                    name,
                    "ok" if fits else "broken",
                    there if fits else f"{there}, needed: {wanted[name]}",
                )
            )
        except PackageNotFoundError:
            state = "missing" if name in OPTIONAL else "broken"
            found.append(
                Finding(
                    "versions",
                    name,
                    state,
                    f"not installed ({OPTIONAL.get(name, 'needed for everything')})",
                )
            )
    return found


def _devices() -> list[Finding]:
    import torch

    from compressor.bench.cpu_timing import processor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        Finding(
            "devices",
            "cpu",
            "ok",
            f"{processor()}, {cores} cores, torch uses {torch.get_num_threads()} threads",
        )
    ]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        room = f"{size(free)} of {size(total)} free"
        text = f"{facts.name}, sm_{facts.major}{facts.minor}, {room}, CUDA {torch.version.cuda}"
        found.append(Finding("devices", f"cuda:{index}", "ok", text))
    if len(found) == 1:
        build = (
            f"this torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "this torch is built without CUDA"
        )
        found.append(Finding("devices", "cuda", "missing", f"no GPU that torch can use; {build}"))
    return found


def _kernels(build: bool) -> list[Finding]:
    """Whether packed linears compute what they stand for, on every kind of device there is, and by
    what.
    """
    import torch

    found = [Finding("kernels", f"2:4 on {device}", *_kernel(device)) for device in _kinds(torch)]
    found.append(Finding("kernels", "cpu kernels", *_cpu_kernels(build)))
    try:
        found.append(
            Finding(
                "kernels", "triton", "ok", f"{import_module('triton').__version__} can be imported"
            )
        )
    except Exception as error:  # it looks for drivers and compilers at import
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        found.append(
            Finding(
                "kernels",
                "triton",
                "missing" if missing else "broken",
                "not installed" if missing else _said(error),
            )
        )
    return found


def _cpu_kernels(build: bool) -> tuple[str, str]:
    """State and text: the kernels for this CPU, compiled now if `build`."""
    from compressor_kernels.cpu.build import NoKernelsError, find_or_compile, kernels

    try:
        there = kernels() if build else find_or_compile(compiling=False)
    except (NoKernelsError, OSError) as error:
        return "missing", f"{error}; --build tries now"
    if there.problem:
        return "missing", f"packed weights are computed dense on the CPU: {there.problem}"
    how = f"compiled in {there.seconds:.0f} s" if there.seconds else "compiled"
    return "ok", f"{how}; packed weights are computed packed"


def _kinds(torch: Any) -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _kernel(kind: str) -> tuple[str, str]:
    """State and text: a packed 2:4 linear on `kind` against the dense product, in bfloat16; as it
    is stored, and in the layout that it is loaded in, where the kernels for that are there.
    """
    import torch

    from compressor.formats.sparse24 import Sparse24
    from compressor_kernels.linear import Sparse24Linear

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    weight.view(64, 32, 4).scatter_(
        2, weight.view(64, 32, 4).abs().topk(2, dim=-1, largest=False).indices, 0
    )
    weight, x = weight.bfloat16(), torch.randn(3, 128, generator=generator).bfloat16()
    form = Sparse24.from_dense(weight)
    module = Sparse24Linear(128, 64, bias=False, dtype=torch.bfloat16)
    module.load_state_dict(form.pack())
    exact = x.double() @ weight.double().T

    def off() -> float:
        with torch.no_grad():
            y = module(x.to(kind)).double().cpu()
        return ((y - exact).norm() / exact.norm()).item()

    module.to(kind)
    errors = [off()]
    if kind != "cpu" or _cpu_kernels(build=False)[0] == "ok":
        module.prepare_()
        errors.append(off())
    error = max(errors)
    if not error <= 0.01:  # bfloat16 keeps 8 bits: a right product is off by about 0.003
        return "broken", f"the product of a packed linear is off by {error:.2g}: please report this"
    return "ok", f"packed linears compute what they stand for (off by {error:.1g} in bfloat16)"


def _memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    return [
        Finding(
            "room",
            "memory",
            "ok",
            f"{size(memory.available)} of {size(memory.total)} free",
        )
    ]


def _disks() -> list[Finding]:
    from huggingface_hub import constants

    places = {
        "here": Path.cwd(),
        "Hub cache": Path(constants.HF_HUB_CACHE),
        "own cache": cache_folder(),
    }
    return [
        Finding("room", name, "ok", f"{size(_free(place))} free, {place}")
        for name, place in places.items()
    ]


def _free(place: Path) -> int:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _hub() -> list[Finding]:
    from huggingface_hub import constants, get_token

    offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    known = get_token() is not None
    text = (
        "a token is there"
        if known
        else "not logged in: public models can be read; `hf auth login` before compress push"
    )
    return [
        Finding(
            "Hub", "account", "ok" if known else "missing", f"{text}; {constants.ENDPOINT}{offline}"
        )
    ]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"

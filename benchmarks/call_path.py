"""What a packed linear costs before any arithmetic: Python, checks, torch's dispatcher, and our own
choice of a kernel. Kernels are not launched, so this runs on any CPU.

    python benchmarks/call_path.py

Each line is the time of one call with one row of x, the quiet minimum of several rounds, and how
much longer it takes than `torch.nn.functional.linear` on a matrix so small that it costs nothing.
For the packed layouts the launch itself is left out (`backend.launch` does nothing): what Triton
takes to start a kernel comes on top, and would be the same however a linear were called.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

from compressor_kernels import armor, backend, kernel_config, layouts, lowrank, pivot, sparse24
from compressor_kernels.fused_projections import fuse
from compressor_kernels.layouts import Dense, InFragments, Stored
from compressor_kernels.linear import ArmorLinear, LowRankLinear, Sparse24Linear
from compressor_kernels.packing import pack24

OUT = IN = 64
CALLS, ROUNDS = 100, 500  # rounds short enough that some are not interrupted


def quiet(call: Callable[[], object]) -> float:
    """Microseconds of one call: the least of ROUNDS means."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best * 1e6


def pretend_gpu() -> None:
    """Take the way that a call takes on a GPU, up to the launch."""
    backend.runs = lambda x: True
    layouts.sparse_tensor_cores = lambda device: True
    for module in (sparse24, armor, lowrank, pivot):
        module.launch = lambda *arguments, **settings: None
    backend.nvidia = lambda: True
    backend.hopper = lambda device: False
    kernel_config.multiprocessors = lambda device: 132
    kernel_config.device_name = lambda device: "pretended"


def weight24() -> torch.Tensor:
    weight = torch.randn(OUT, IN // 4, 4)
    return (weight * (weight.argsort(-1).argsort(-1) > 1)).view(OUT, IN).bfloat16()


def filled(module: nn.Module, layout: type | None = None) -> nn.Module:
    state = {n: torch.randn(t.shape).to(t.dtype) for n, t in module.state_dict().items()}
    if "weight_values" in state:
        state["weight_values"], state["weight_metadata"] = pack24(weight24())
    module.load_state_dict(state)
    if isinstance(module, LowRankLinear):
        module.prepare_()
    else:
        module.place_(layout)
    return module


def cases() -> dict[str, Callable[[torch.Tensor], object]]:
    common = {"bias": False, "dtype": torch.bfloat16}
    core = {"in_features": IN, "out_features": OUT, **common}
    blocks = {"block_a": 16, "block_b": 16}
    trio = [filled(Sparse24Linear(**core), InFragments) for _ in range(3)]
    assert fuse(trio)
    q, k, v = trio
    return {
        "nn.Linear": nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16),
        "2:4 dense": filled(Sparse24Linear(**core), Dense),
        "2:4 stored": filled(Sparse24Linear(**core), Stored),
        "2:4 in fragment order": filled(Sparse24Linear(**core), InFragments),
        "q, k and v in one launch, a linear": lambda x: (q(x), k(x), v(x)),
        "ARMOR in fragment order": filled(ArmorLinear(**core, **blocks), InFragments),
        "low rank": filled(LowRankLinear(IN, OUT, rank=16, **common)),
    }


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    pretend_gpu()
    x, w = torch.randn(1, IN).bfloat16(), torch.randn(OUT, IN).bfloat16()
    plain = quiet(lambda: linear(x, w))
    print(f"torch {torch.__version__}; F.linear itself takes {plain:.1f} us")
    print("| a call of | us | over F.linear |\n|---|---:|---:|")
    for name, module in cases().items():
        taken = quiet(lambda module=module: module(x)) / (3 if name.startswith("q, k") else 1)
        print(f"| {name} | {taken:.1f} | {taken - plain:.1f} |")


if __name__ == "__main__":
    main()

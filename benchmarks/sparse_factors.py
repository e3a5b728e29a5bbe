"""Should the factors of a low-rank linear be 2:4 themselves? Output errors at equal bytes, on real
trained models.

    python benchmarks/sparse_factors.py

For every linear, the relative squared error of its outputs, tr(E A Eᵀ) / tr(W A Wᵀ) with A = XᵀX,
averaged over the linears:

    dense factors    rank k, the optimum (svd_llm)
    2:4 factors      rank k / 0.5625: V pruned by SparseGPT on A, U solved again for the pruned V,
                     pruned by SparseGPT on V A Vᵀ
    2:4 weight       SparseGPT on the weight itself, which is stored at 56 %

Models and token rows are those of benchmarks/ratios.py: COMPRESS_SHARED names their parent.
"""

from __future__ import annotations

import argparse
from statistics import mean

import torch
from common import SHARED
from lowrank import MODELS
from torch import Tensor

from compressor.config.recipe import Recipe
from compressor.engine.blocks import dense_blocks
from compressor.methods import sparsegpt, svd_llm
from compressor.pattern import Pattern
from compressor.run.check import plan_run
from compressor.run.pipeline import calibrate
from compressor.stats import InputStats

CPU, HALF = torch.device("cpu"), Pattern.parse("2:4")
PACKED = 0.5625  # bytes of a packed 2:4 bf16 matrix over those of a dense one
KEEPS = [0.8, 0.7, 0.6, 0.5]


def error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """tr(E A Eᵀ) / tr(W A Wᵀ)."""
    difference, wide = (weight - found).double(), weight.double()
    return (((difference @ gram) * difference).sum() / ((wide @ gram) * wide).sum()).item()


def sparse_factors(weight: Tensor, stats: InputStats, gram: Tensor, rank: int) -> Tensor:
    """The product of two 2:4 factors of rank `rank`."""
    v = sparsegpt.compress(svd_llm.compress(weight, stats, rank).v, stats, HALF).dense().double()
    inner = v @ gram @ v.T
    inner.diagonal().add_(1e-6 * inner.diagonal().mean())
    u = torch.linalg.solve(inner, v @ gram @ weight.double().T).T
    within = InputStats(rank, gram=True)
    within.tokens, within.gram = stats.tokens, inner.float()
    return sparsegpt.compress(u.float(), within, HALF).dense().double() @ v


def measure(name: str) -> dict[str, dict[float, float]]:
    """Mean errors over the linears of a model, by row and fraction of the bytes."""
    rows = str(SHARED / "data" / "canary" / f"{name}-calib.jsonl")
    recipe = Recipe(
        str(SHARED / "models" / name), method="svd_llm", keep="50%", dtype="float32", dataset=rows
    )
    plan = plan_run(recipe, None)
    found: dict[str, dict[float, list[float]]] = {
        row: {keep: [] for keep in KEEPS} for row in ("dense factors", "2:4 factors")
    }
    plain: list[float] = []
    for tasks, statistics in dense_blocks(plan, calibrate(plan, recipe, CPU), CPU, gram=True):
        for task in tasks:
            weight, stats = task.linear.read(plan.reader).float(), statistics[task.linear.name]
            assert stats.gram is not None
            gram, (out, into) = stats.gram.double(), weight.shape
            plain.append(error(weight, sparsegpt.compress(weight, stats, HALF).dense(), gram))
            for keep in KEEPS:
                exact = keep * out * into / (out + into)
                dense, sparse = (
                    int(exact),
                    min(int(exact / PACKED) // 4 * 4, min(out, into) // 4 * 4),
                )
                found["dense factors"][keep].append(
                    error(weight, svd_llm.compress(weight, stats, dense).dense(), gram)
                )
                found["2:4 factors"][keep].append(
                    error(weight, sparse_factors(weight, stats, gram, sparse), gram)
                )
    return {
        row: {keep: mean(values) for keep, values in cells.items()} for row, cells in found.items()
    } | {"2:4 weight": dict.fromkeys(KEEPS, mean(plain))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=MODELS, choices=MODELS)
    for name in parser.parse_args().model:
        print(
            f"**{name}**\n\n| bytes | {' | '.join(f'{keep:.0%}' for keep in KEEPS)} |\n|---|"
            + "---:|" * len(KEEPS)
        )
        for row, cells in measure(name).items():
            print(f"| {row} | {' | '.join(f'{value:.4f}' for value in cells.values())} |")
        print(flush=True)


if __name__ == "__main__":
    main()

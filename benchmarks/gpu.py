"""Everything there is to know about the kernels on one GPU, in one command. Needs a CUDA device and Triton.

    python benchmarks/gpu.py                        # all parts, into benchmarks/results/DATE-GPU/
    python benchmarks/gpu.py --part check           # only: is every kernel right on this chip?
    python benchmarks/gpu.py --part tune --write-table
    python benchmarks/gpu.py --part kernels --quick

check    every kernel against float64 at awkward sizes, float16 and bfloat16. `mma.sp` is tried first: that it holds its
         fragments as PTX documents them is what an emulator cannot prove. A failure ends the run with exit code 1.
tune     settings by shape and rows of x, all measured with rotating weights in CUDA graphs; the best are tuned.json, and with
         --write-table rows of kernels/compressor_kernels/table.json, which the ops look up.
kernels  our ops against dense cuBLAS and PyTorch's semi-structured product, with the settings that the ops choose.
decode   a random model of the shape of Llama-3-8B: greedy decoding in a captured step, dense, then 2:4.

Errors are root mean squares relative to the result; the bars are 1e-3 (float16) and 5e-3 (bfloat16).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.bench import decode, kernels, report, timing
from compressor.errors import CompressError
from compressor_kernels import backend, choice
from compressor_kernels import sparse24 as sparse
from compressor_kernels.armor import run_armor
from compressor_kernels.fragments import to_fragments
from compressor_kernels.linear import Sparse24Linear
from compressor_kernels.lowrank import lowrank, run_skinny
from compressor_kernels.packing import pack24, unpack24
from compressor_kernels.siblings import join

PARTS = ("check", "tune", "kernels", "decode")
TABLE = Path(choice.__file__).with_name("table.json")
CHECKED_SHAPES = ((128, 256), (40, 132), (1000, 2052), (4096, 4096))
CHECKED_ROWS = (1, 3, 7, 16, 17, 63, 96)
TUNED_ROWS = (1, 4, 8, 16, 32, 64)
QUICK_SHAPES = ((4096, 4096), (4096, 14336))
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def mma_configs(out_features: int, rows: int, processors: int, heights: tuple[int, ...], orders: tuple[bool, ...]) -> list[dict]:
    """Arrangements of programs so many row tiles high; where K is split, with 8 to 48 warps for each multiprocessor."""
    found = []
    for high, each, warps, unroll, split in itertools.product(heights, (1, 2, 4), (8, 16), (1, 2), (1, 2, 4, 8, 16)):
        resident = -(-out_features // (16 * high)) * split * warps / processors
        fits = high % each == 0 and (unroll == 1 or (each == 1 and rows <= 4)) and warps <= (16 if rows <= 16 else 8)
        if fits and (split == 1 or 8 <= resident <= 48):
            config = {"kernel": "mma", "warps": warps, "stack": high // each, "row_tiles": each, "split": split, "unroll": unroll}
            found += [{**config, "ordered": ordered} for ordered in orders]
    return found


def dot_configs(rows: int) -> list[dict[str, Any]]:
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return [
        {"kernel": "dot", "bm": block, "bn": 32, "bk": bk, "split": split, "warps": warps, "stages": 3}
        for warps, bk, split in itertools.product((2, 4), (128, 256), (1, 2, 4, 8))
    ]


# ---------------------------------------------------------------------------------------------------------------- check


@torch.no_grad()
def check(device: torch.device) -> list[dict[str, Any]]:
    """Rows with the error of each kernel; `ok` says whether it is below its bar."""
    found: list[dict[str, Any]] = []
    for dtype, (n, k) in itertools.product((torch.bfloat16, torch.float16), CHECKED_SHAPES):
        weight, bias = kernels.random24(n, k, dtype, device), torch.randn(n, dtype=dtype, device=device)
        weight[: n // 2, :8] = 0  # groups without a value
        packed = pack24(weight)
        fragments, semaphore = to_fragments(*packed), sparse.new_semaphore(n, device)
        assert torch.equal(unpack24(*packed), weight)
        for name, unpack, arguments in (
            ("unpack_fragments", sparse.unpack_fragments, (fragments, n, k)),
            ("unpack_stored", sparse.unpack_stored, packed),
        ):
            found.append(_checked(name, n, k, 0, dtype, partial(unpack, *arguments), weight.double()))
        for m in CHECKED_ROWS:
            x = torch.randn(m, k, dtype=dtype, device=device)
            expected = x.double() @ weight.double().T + bias.double()
            mma = {"kernel": "mma", "warps": 8, "stack": 1, "row_tiles": 1, "split": 1, "unroll": 1, "ordered": False}
            for config in (
                mma,
                {**mma, "stack": 2, "row_tiles": 2, "split": 3, "unroll": 2},
                {**mma, "stack": 4, "row_tiles": 2, "split": 4, "ordered": True},
                *([{**mma, "split": 2, "pdl": True}] if backend.hopper(device) else []),
                *([{"kernel": "gemv", "warps": 4, "split": 2}] if m == 1 else []),
                choice.rule("fragments", n, k, m, 132),
            ):
                run = partial(sparse.run_fragments, x, fragments, n, bias, semaphore, config)
                found.append(_checked(_name(config), n, k, m, dtype, run, expected, semaphore))
            for config in (choice.rule("stored", n, k, m, 132), {**dot_configs(m)[0], "split": 2}):
                run = partial(sparse.run_stored, x, *packed, bias, semaphore, config)
                found.append(_checked(_name(config), n, k, m, dtype, run, expected, semaphore))
            found += _check_factored(x, weight, bias)
    return found


def _check_factored(x: Tensor, weight: Tensor, bias: Tensor) -> list[dict[str, Any]]:
    (n, k), m, dtype, device = weight.shape, len(x), x.dtype, x.device
    u, v = torch.randn(n, 48, dtype=dtype, device=device) / 7, torch.randn(48, k, dtype=dtype, device=device) / k**0.5
    semaphore = sparse.new_semaphore(max(n, 48), device)
    expected = x.double() @ v.double().T @ u.double().T + bias.double()
    found = [_checked("lowrank", n, k, m, dtype, lambda: lowrank(x, u, v, bias, semaphore), expected, semaphore)]
    if n % 128 == 0 and k % 128 == 0 and m <= 64:
        a, b = (torch.randn(size // 128, 128, 128, dtype=dtype, device=device) / 128**0.5 for size in (n, k))
        fragments = to_fragments(*pack24(weight))
        inner = (x.double().view(m, -1, 1, 128) @ b.double().transpose(1, 2)).reshape(m, k)
        outer = ((inner @ weight.double().T).view(m, -1, 1, 128) @ a.double().transpose(1, 2)).reshape(m, n) + bias.double()
        for split, pdl in ((1, False), (4, False), (4, True)):
            if pdl and not backend.hopper(device):
                continue
            config = {"kernel": "mma", "warps": 8, "stack": 4, "row_tiles": 2, "split": split, "unroll": 1, "pdl": pdl}
            run = partial(run_armor, x, fragments, a, b, bias, semaphore, config)
            found.append(_checked(f"armor split {split} pdl {pdl}", n, k, m, dtype, run, outer, semaphore))
    return found


def _name(config: dict[str, Any]) -> str:
    return " ".join(f"{value}" if key == "kernel" else f"{key} {value}" for key, value in config.items())


def _checked(
    name: str, n: int, k: int, m: int, dtype: torch.dtype, run: Any, expected: Tensor, semaphore: Tensor | None = None
) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": name, "out": n, "in": k, "rows": m, "dtype": str(dtype).removeprefix("torch.")}
    try:
        results = [run() for _ in range(3)]
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, it is the result of this check
        return {**row, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    error = float((results[0].double() - expected).norm() / expected.norm())
    bar = {torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype] if m else 0.0
    same = all(torch.equal(results[0], other) for other in results[1:])
    clean = semaphore is None or not bool(semaphore.any())
    return {**row, "ok": error <= bar and same and clean, "rms": error, "deterministic": same, "semaphore_zero": clean}


# ----------------------------------------------------------------------------------------------------------------- tune


@torch.no_grad()
def tune(
    device: torch.device, shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...], until: float
) -> tuple[list[dict], list[dict]]:
    """All measurements, and the best of each shape and count of rows as rows of the table. Stops in time, by shapes."""
    everything: list[dict[str, Any]] = []
    best: list[dict[str, Any]] = []
    for n, k in shapes:
        if time.monotonic() > until:
            print(f"out of time before {n} x {k}", file=sys.stderr)
            break
        weight = kernels.random24(n, k, torch.bfloat16, device)
        count = timing.copies(weight.nbytes // 2, device)
        dense = [weight.clone() for _ in range(count)]
        modules = {op: [kernels.module(op, weight) for _ in range(count)] for op in kernels.OPS}
        for m in rows:
            x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
            cublas = timing.measure([partial(torch.nn.functional.linear, x, w) for w in dense], 10).median
            for op, size, run, configs in _candidates(modules, x):
                base = {"device": backend.device_name(device), "op": op, "out": size[0], "in": size[1], "rows": m}
                timed = [_timed(run, modules[_kind(op)], config) for config in configs]
                fastest = min(timed, key=_us)
                if fastest["kernel"] == "mma" and backend.hopper(device):
                    timed.append(_timed(run, modules[_kind(op)], {**fastest, "pdl": True}))
                    fastest = min(timed, key=_us)
                everything += [{**base, **row, "dense_us": round(cublas, 2)} for row in timed]
                if "error" in fastest:  # none of them runs here; `tune` has the errors
                    continue
                best.append({**base, **fastest, **({} if op == "skinny" else {"speedup": round(cublas / fastest["us"], 3)})})
                print(f"{op} {size[0]} x {size[1]}, {m} rows: cuBLAS {cublas:.1f} us: {_name(fastest)}", file=sys.stderr)
    return everything, best


def _timed(run: Any, modules: list[Any], config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what it took, or why it does not run."""
    try:
        return {**config, "us": round(timing.measure([partial(run, made, config) for made in modules], 10).median, 2)}
    except Exception as error:  # too many registers, say: not a choice
        return {**config, "error": str(error)[:200]}


def _us(row: dict[str, Any]) -> float:
    return row.get("us", float("inf"))


def _kind(op: str) -> str:
    return {"fragments": "sparse24", "armor": "armor", "skinny": "lowrank"}[op]


def _candidates(modules: dict[str, list[Any]], x: Tensor) -> list[tuple[str, tuple[int, int], Any, list[dict[str, Any]]]]:
    """Op, shape, how to run a module with a configuration, and the configurations, for one x."""
    m = len(x)
    example = modules["lowrank"][0]
    n, k, rank = example.out_features, example.in_features, example.rank
    processors, inner = backend.multiprocessors(x.device), torch.randn(m, rank, dtype=x.dtype, device=x.device)
    usual = choice.rule("fragments", n, k, m, processors)
    high = usual["stack"] * usual["row_tiles"]
    heights = tuple(tall for tall in (high // 2, high, 2 * high) if 1 <= tall <= 8)
    mma = mma_configs(n, m, processors, heights, (False,) if m <= 4 else (False, True) if m <= 16 else (True,))
    gemv = [{"kernel": "gemv", "warps": w, "split": s} for w, s in itertools.product((8, 16), (1, 2))] if m == 1 else []
    found = [
        ("fragments", (n, k), lambda made, c: sparse.run_fragments(x, made.packed, n, None, made.semaphore, c), mma + gemv),
        ("skinny", (rank, k), lambda made, c: run_skinny(x, made.weight_v, None, made.semaphore, c), dot_configs(m)),
        ("skinny", (n, rank), lambda made, c: run_skinny(inner, made.weight_u, None, made.semaphore, c), dot_configs(m)),
    ]

    def armor(made: Any, config: dict[str, Any]) -> Tensor:
        return run_armor(x, made.packed, made.weight_a, made.weight_b, None, made.semaphore, config)

    if m <= 64:
        found.append(("armor", (n, k), armor, mma_configs(n, m, processors, (4, 8), (True,))))  # a block of A: two programs, or one
    return found


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put measured rows in place of the older ones of the same device, op, shape and count of rows."""
    key = ("device", "op", "out", "in", "rows")
    kept = {tuple(row[name] for name in key): row for row in json.loads(TABLE.read_text()) + rows}
    lines = ",\n".join(json.dumps(kept[place]) for place in sorted(kept))
    TABLE.write_text(f"[\n{lines}\n]\n")
    choice.table.cache_clear()


# --------------------------------------------------------------------------------------------------------------- decode


@torch.no_grad()
def decode_random(device: torch.device, layers: int) -> list[dict[str, Any]]:
    """Greedy decoding with a random model of the shape of Llama-3-8B, dense and then with all its linears 2:4."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **{**LLAMA_8B, "num_hidden_layers": layers})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows = decode.measure_model(model, "dense")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(parent, name, _random_packed(linear))
        join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
        join([layer.mlp.gate_proj, layer.mlp.up_proj])
    gc.collect()
    torch.cuda.empty_cache()
    return rows + decode.measure_model(model, "2:4")


def _random_packed(linear: torch.nn.Linear) -> Sparse24Linear:
    n, k = linear.weight.shape
    made = Sparse24Linear(k, n, bias=False, dtype=linear.weight.dtype, device=linear.weight.device)
    made.weight_values.data, made.weight_metadata = pack24(kernels.random24(n, k, linear.weight.dtype, linear.weight.device))
    made.prepare_()
    return made


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Parse, run the parts, write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; repeatable")
    parser.add_argument("--quick", action="store_true", help="two shapes, few rows of x, four decoder blocks")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which `tune` begins no further shape")
    parser.add_argument("--write-table", action="store_true", help=f"put the best settings into {TABLE.name}")
    parser.add_argument("--output", type=Path, help="folder of the results")
    chosen = parser.parse_args()
    try:
        device = timing.need_gpu()
    except CompressError as error:
        sys.exit(f"error: {error}")
    if not backend.works(device):
        sys.exit("error: no Triton kernel runs here: nothing was measured")
    facts = timing.environment(device)
    name = f"{datetime.date.today()}-{facts['gpu'].replace(' ', '-')}"
    folder = chosen.output or Path(__file__).parent / "results" / name
    shapes, rows = (QUICK_SHAPES, (1, 16)) if chosen.quick else (kernels.SHAPES, TUNED_ROWS)
    parts, failed = chosen.part or PARTS, False
    folder.mkdir(parents=True, exist_ok=True)

    def save(part: str, found: Any) -> None:
        (folder / f"{part}.json").write_text(json.dumps({"environment": facts, part: found}, indent=1) + "\n")
        print(f"{part}: written to {folder}", file=sys.stderr)

    if "check" in parts:
        checked = check(device)
        save("check", checked)
        wrong = [row for row in checked if not row["ok"]]
        failed = bool(wrong)
        print(f"check: {len(checked) - len(wrong)} of {len(checked)} right")
        for row in wrong[:20]:
            print("  wrong:", row)
    if "tune" in parts and not failed:
        everything, best = tune(device, shapes, rows, time.monotonic() + 60 * chosen.minutes)
        save("tune", everything)
        (folder / "tuned.json").write_text(json.dumps(best, indent=1) + "\n")
        if chosen.write_table:
            write_table(best)
    result: dict[str, Any] = {"environment": facts, "kernels": [], "decode": []}
    if "kernels" in parts and not failed:
        copied = timing.copy_bandwidth(device)
        result["copy_gb_per_s"] = round(copied)
        for shape in shapes:
            counts = rows if chosen.quick else kernels.ROWS
            result["kernels"] += kernels.measure_shape(shape, counts, kernels.OPS, torch.bfloat16, device, copied)
            report.write(folder, result)
    if "decode" in parts and not failed:
        result["decode"] = decode_random(device, 4 if chosen.quick else LLAMA_8B["num_hidden_layers"])
    if result["kernels"] or result["decode"]:
        report.write(folder, result)
        print("\n".join(report.verdicts(result)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Everything there is to know about the kernels on one GPU, in one command. Needs a CUDA device and
Triton.

    python benchmarks/gpu.py                        # all parts, into benchmarks/results/DATE-GPU/
    python benchmarks/gpu.py --part check           # only: is every kernel right on this chip?
    python benchmarks/gpu.py --part tune --write-table
    python benchmarks/gpu.py --part kernels --quick

check    every kernel against float64 at awkward sizes, float16 and bfloat16, five times each. That
         the chip holds the fragments of `mma.sp` as PTX documents them is what an emulator cannot
         prove. A failure ends the run: exit code 1.
tune     settings by shape and rows of x, all measured with rotating weights in CUDA graphs; the
         best are tuned.json, and with --write-table rows of kernels/compressor_kernels/table.json,
         which the ops look up.
kernels  our ops against dense cuBLAS and PyTorch's semi-structured product, with the settings that
         the ops choose.
decode   a random model of the shape of Llama-3-8B: greedy decoding in a captured step, dense, then
         2:4.

Errors are root mean squares relative to the result; the bars are 1e-3 (float16) and 5e-3
(bfloat16).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from compressor.bench import check, decode, kernels, report, timing, tune
from compressor.cli.bench import numbers, out_in
from compressor.errors import CompressError
from compressor_kernels import backend, kernel_config
from compressor_kernels.fused_projections import fuse

PARTS = ("check", "tune", "kernels", "decode")
TABLE = Path(kernel_config.__file__).with_name("table.json")
CHECKED_SHAPES = ((128, 256), (40, 132), (1000, 2052), (4096, 4096))
CHECKED_ROWS = (1, 3, 7, 16, 17, 63, 96)
TUNED_ROWS = (1, 4, 8, 16, 32, 64)
QUICK_SHAPES = ((4096, 4096), (4096, 14336))
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip


def save(folder: Path, facts: dict[str, Any], name: str, found: list[dict[str, Any]]) -> None:
    (folder / f"{name}.json").write_text(
        json.dumps({"environment": facts, name: found}, indent=1) + "\n"
    )


def all_right(device: torch.device, folder: Path, facts: dict[str, Any]) -> bool:
    checked: list[dict[str, Any]] = []
    for row in check.check(device, CHECKED_SHAPES, CHECKED_ROWS):
        checked.append(row)
        save(folder, facts, "check", checked)
        if not row["ok"]:
            print("wrong:", row, flush=True)
    right = sum(row["ok"] for row in checked)
    print(f"check: {right} of {len(checked)} right", flush=True)
    return right == len(checked)


def tuned(
    device: torch.device,
    folder: Path,
    facts: dict[str, Any],
    shapes: tuple,
    rows: tuple[int, ...],
    seconds: float,
) -> list[dict[str, Any]]:
    everything: list[dict[str, Any]] = []
    best: list[dict[str, Any]] = []
    for measured, fastest in tune.tune(device, shapes, rows, time.monotonic() + seconds):
        everything += measured
        best += fastest
        save(folder, facts, "tune", everything)
        (folder / "tuned.json").write_text(json.dumps(best, indent=1) + "\n")
    return best


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put measured rows in place of the older ones of the same device, op, shape and count of
    rows.
    """
    key = ("device", "op", "out", "in", "rows")
    kept = {tuple(row[name] for name in key): row for row in json.loads(TABLE.read_text()) + rows}
    lines = ",\n".join(json.dumps(kept[place]) for place in sorted(kept))
    TABLE.write_text(f"[\n{lines}\n]\n")
    kernel_config.table.cache_clear()
    kernel_config.choose.cache_clear()


@torch.no_grad()
def decode_random(device: torch.device, layers: int) -> list[dict[str, Any]]:
    """Greedy decoding with a random model of the shape of Llama-3-8B, dense and then with all its
    linears 2:4.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **{**LLAMA_8B, "num_hidden_layers": layers})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows = decode.measure_model(model, "dense")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    n, k = linear.weight.shape
                    setattr(
                        parent,
                        name,
                        kernels.module(
                            "sparse24", kernels.random24(n, k, linear.weight.dtype, device)
                        ),
                    )
        fuse([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
        fuse([layer.mlp.gate_proj, layer.mlp.up_proj])
    gc.collect()
    torch.cuda.empty_cache()
    return rows + decode.measure_model(model, "2:4")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; repeatable")
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, few rows of x, four decoder blocks"
    )
    parser.add_argument("--shape", action="append", help="OUTxIN, only this one; repeatable")
    parser.add_argument("--rows", help="of x, such as 1,4,16")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="after which `tune` begins nothing more"
    )
    parser.add_argument(
        "--write-table", action="store_true", help=f"put the best settings into {TABLE.name}"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the results; what is there already is kept"
    )
    return parser.parse_args()


def main() -> None:
    """Run the parts, and write what was found as soon as it is."""
    chosen = options()
    try:
        only = tuple(out_in(text) for text in chosen.shape or ())
        rows = tuple(numbers(chosen.rows, "--rows")) if chosen.rows else ()
        device = timing.need_gpu()
    except CompressError as error:
        sys.exit(f"error: {error}")
    if not backend.works(device):
        sys.exit("error: no Triton kernel runs here: nothing was measured")
    facts = timing.environment(device)
    folder = (
        chosen.output
        or Path(__file__).parent
        / "results"
        / f"{datetime.date.today()}-{facts['gpu'].replace(' ', '-')}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    shapes = only or (QUICK_SHAPES if chosen.quick else kernels.SHAPES)
    few, many = (
        rows or usual for usual in (((1, 16),) * 2 if chosen.quick else (TUNED_ROWS, kernels.ROWS))
    )
    parts = chosen.part or PARTS

    if "check" in parts and not all_right(device, folder, facts):
        sys.exit(1)
    if "tune" in parts:
        best = tuned(device, folder, facts, shapes, few, 60 * chosen.minutes)
        if chosen.write_table:
            write_table(best)
    before = folder / "bench.json"
    result: dict[str, Any] = (
        json.loads(before.read_text()) if before.exists() else {"kernels": [], "decode": []}
    )
    result["environment"] = facts
    if "kernels" in parts:
        copied = timing.copy_bandwidth(device)
        result |= {"copy_gb_per_s": round(copied), "kernels": []}
        for size in shapes:
            result["kernels"] += kernels.measure_shape(
                size, many, kernels.OPS, torch.bfloat16, device, copied
            )
            report.write(folder, result)
    if "decode" in parts:
        result["decode"] = decode_random(
            device, 4 if chosen.quick else LLAMA_8B["num_hidden_layers"]
        )
        report.write(folder, result)
    print("\n".join(report.verdicts(result)))


if __name__ == "__main__":
    main()

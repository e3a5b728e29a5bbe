"""Peak memory and time of `compress prune`: memory flat in the number of blocks, time linear in
blocks and in calibration tokens.

    python benchmarks/memory.py                    # 22 blocks, the shape of TinyLlama, 2.2 GB
    python benchmarks/memory.py --blocks 4 8 16 32 --csv memory.csv
    python benchmarks/memory.py --blocks 4 --samples 2 4 8 16 --seq-len 256
    python benchmarks/memory.py --blocks 1 --experts 32 --expert-tokens routed \
        --method sparsegpt --max-memory 100GB 1.8GB
    # compress plan instead: the pass that takes gradients
    python benchmarks/memory.py --ratios ecoflap --seq-len 512
    # every method and allocator at two depths
    python benchmarks/memory.py --every --blocks 4 24 --hidden 512 --inter 1408 \
        --samples 8 --seq-len 256

Makes a random checkpoint of each depth (shard by shard, so that making it needs little memory too),
prunes it in a process of its own and samples that process's anonymous memory; pages of the mapped
input files are the kernel's to take back.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HEADS, KV_HEADS, VOCAB = 32, 4, 32000
EXPERT = 768  # width of an expert
SHARDS = 12
SHARED = ["prune", "--method", "wanda", "--pattern", "50%"]
EVERY = {
    "wanda": ["prune", "--method", "wanda"],
    "nowag": ["prune", "--method", "nowag"],
    "sparsegpt": ["prune", "--method", "sparsegpt"],
    "dsnot": [*SHARED, "--refine", "dsnot"],
    "admm": ["prune", "--method", "wanda", "--refine", "admm"],
    "armor": ["prune", "--method", "armor", "--set", "iterations=2", "--set", "finish=1"],
    "svd": ["lowrank", "--method", "svd", "--keep", "0.5"],
    "welore": ["lowrank", "--method", "welore", "--keep", "0.8"],
    "asvd": ["lowrank", "--method", "asvd", "--keep", "0.5"],
    "svd_llm": ["lowrank", "--method", "svd_llm", "--keep", "0.5"],
    "fisher": ["lowrank", "--method", "fisher", "--keep", "0.5"],
    "uniform": [*SHARED, "--ratios", "uniform"],
    "owl": [*SHARED, "--ratios", "owl"],
    "ecoflap, first order": [*SHARED, "--ratios", "ecoflap"],
    "ecoflap, zeroth order": [*SHARED, "--ratios", "ecoflap", "--set", "ratios.score=zeroth"],
    "curve": [*SHARED, "--ratios", "curve"],
}


def make_checkpoint(folder: Path, blocks: int, experts: int, hidden: int, inter: int) -> None:
    """A random bf16 Llama in twelve shards, or as many as it has blocks; with experts a Qwen3
    mixture.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inter,
        "vocab_size": VOCAB,
        "num_hidden_layers": blocks, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    if experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "head_dim": hidden // HEADS,
            "num_experts": experts, "num_experts_per_tok": min(8, experts),
            "moe_intermediate_size": EXPERT,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden // HEADS * KV_HEADS
    inside = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    if experts:
        inside = {name: shape for name, shape in inside.items() if not name.startswith("mlp.")}
        inside |= {
            "self_attn.q_norm": (hidden // HEADS,),
            "self_attn.k_norm": (hidden // HEADS,),
            "mlp.gate": (experts, hidden),
        }
        for expert in range(experts):
            inside |= {
                f"mlp.experts.{expert}.{name}": (EXPERT, hidden)
                for name in ("gate_proj", "up_proj")
            }
            inside[f"mlp.experts.{expert}.down_proj"] = (hidden, EXPERT)
    shapes = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(blocks)
        for name, shape in inside.items()
    }
    shapes |= {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCAB, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    count = min(SHARDS, blocks)
    names, weight_map = list(shapes), {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = names[len(names) * shard // count : len(names) * (shard + 1) // count]
        tensors = {}
        for name in part:
            weight = (
                torch.ones(shapes[name])
                if "norm" in name
                else torch.randn(shapes[name], generator=generator) * 0.02
            )
            tensors[name] = weight.bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def watch(command: list[str]) -> tuple[float, float, float]:
    """Run `command`; returns its peak anonymous memory in GB, its seconds, and those of CPU, which
    other work does not lengthen.
    """
    started, before = time.perf_counter(), os.times()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max(
            [
                peak,
                *[
                    int(line.split()[1])
                    for line in status.splitlines()
                    if line.startswith("RssAnon")
                ],
            ]
        )
        time.sleep(0.01)
    if process.wait():
        sys.exit(f"{' '.join(command)} failed")
    after = os.times()
    return peak * 1024 / 1e9, time.perf_counter() - started, sum(after[2:4]) - sum(before[2:4])


def measure(
    model: Path, arguments: argparse.Namespace, samples: int, limit: str, case: str = ""
) -> dict[str, Any]:
    """One run on so many samples of random tokens; `case` is one of EVERY."""
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.jsonl"
        lines = torch.randint(
            3, VOCAB, (samples, arguments.seq_len), generator=torch.Generator().manual_seed(1)
        ).tolist()
        ids.write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in lines))
        verb = ["prune", "--method", arguments.method]
        if arguments.ratios:
            verb = ["plan", *verb[1:], "--ratios", arguments.ratios, "--pattern", "50%"]
        if case:
            verb = EVERY[case]
        command = [
            sys.executable,
            "-m",
            "compressor",
            *verb,
            str(model),
            "-o",
            str(Path(scratch) / "out"),
        ]
        command += ["--expert-tokens", arguments.expert_tokens] if arguments.experts else []
        command += ["--max-memory", limit] if limit else []
        command += [
            "--dataset",
            str(ids),
            "--num-samples",
            str(samples),
            "--seq-len",
            str(arguments.seq_len),
            "-q",
        ]
        peak, seconds, computed = watch([*command, "--device", "cpu"])
        report = Path(scratch) / "out.report.json"
        run = json.loads(report.read_text())["run"] if report.exists() else {}
    return {
        "tokens": samples * arguments.seq_len,
        "max_memory": limit,
        "peak_anonymous_gb": round(peak, 3),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(computed, 1),
        "blocks_seconds": round(sum(run.get("block_seconds", [])), 1),
        "journal_seconds": run.get("journal_seconds", 0),
    }


def measure_every(arguments: argparse.Namespace) -> None:
    """Print a row for every method and allocator: its peaks at the depths, and the last in units of
    the first.
    """
    depths, samples = arguments.blocks, arguments.samples[0]
    with tempfile.TemporaryDirectory() as scratch:
        models = {depth: Path(scratch) / str(depth) for depth in depths}
        for depth, folder in models.items():
            make_checkpoint(folder, depth, 0, arguments.hidden, arguments.inter)
        print(f"| | {' | '.join(f'{depth} blocks' for depth in depths)} | last / first |")
        print(f"|---|{'---:|' * (len(depths) + 1)}")
        for case in EVERY:
            peaks = [
                measure(folder, arguments, samples, arguments.max_memory[0], case)[
                    "peak_anonymous_gb"
                ]
                for folder in models.values()
            ]
            cells = [f"{peak:.3f} GB" for peak in peaks]
            print(f"| {case} | {' | '.join(cells)} | {peaks[-1] / peaks[0]:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[22])
    parser.add_argument(
        "--experts", type=int, default=0, help="of each block: a mixture instead of a dense model"
    )
    parser.add_argument("--expert-tokens", default="routed")
    parser.add_argument("--method", default="wanda")
    parser.add_argument(
        "--ratios",
        default="",
        help="measure `compress plan --pattern 50%%` with these ratios instead of prune",
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[2])
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--max-memory", nargs="+", default=[""])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model")
    parser.add_argument("--inter", type=int, default=5632, help="width inside its MLP")
    parser.add_argument("--every", action="store_true", help="every method and allocator")
    arguments = parser.parse_args()
    if arguments.every:
        measure_every(arguments)
        return
    rows = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            make_checkpoint(model, blocks, arguments.experts, arguments.hidden, arguments.inter)
            size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
            facts = {
                "method": arguments.method,
                "ratios": arguments.ratios,
                "blocks": blocks,
                "experts": arguments.experts,
            }
            for samples in arguments.samples:
                for limit in arguments.max_memory:
                    row = {
                        **facts,
                        "checkpoint_gb": round(size, 3),
                        **measure(model, arguments, samples, limit),
                    }
                    rows.append({**row, "torch": torch.__version__, "machine": platform.machine()})
                    print(rows[-1], flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

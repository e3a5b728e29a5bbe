"""Peak memory and time of `compress prune`: memory flat in the number of blocks, time linear in
blocks and in calibration tokens.

    python benchmarks/memory.py                    # 22 blocks, the shape of TinyLlama, 2.2 GB
    python benchmarks/memory.py --blocks 4 8 16 32 --csv memory.csv
    python benchmarks/memory.py --blocks 4 --samples 2 4 8 16 --seq-len 256
    python benchmarks/memory.py --blocks 1 --experts 32 --expert-tokens routed \
        --method sparsegpt --max-memory 100GB 1.8GB
    # compress plan instead: the pass that takes gradients
    python benchmarks/memory.py --ratios ecoflap --seq-len 512

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

HIDDEN, INTER, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 32000
EXPERT = 768  # width of an expert
SHARDS = 12


def make_checkpoint(folder: Path, blocks: int, experts: int) -> None:
    """A random bf16 Llama in twelve shards, or as many as it has blocks; with experts a Qwen3
    mixture.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "vocab_size": VOCAB,
        "num_hidden_layers": blocks, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    if experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "head_dim": HIDDEN // HEADS,
            "num_experts": experts, "num_experts_per_tok": min(8, experts),
            "moe_intermediate_size": EXPERT,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    kv = HIDDEN // HEADS * KV_HEADS
    inside = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTER, HIDDEN),
        "mlp.up_proj": (INTER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTER), "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    if experts:
        inside = {name: shape for name, shape in inside.items() if not name.startswith("mlp.")}
        inside |= {
            "self_attn.q_norm": (HIDDEN // HEADS,),
            "self_attn.k_norm": (HIDDEN // HEADS,),
            "mlp.gate": (experts, HIDDEN),
        }
        for expert in range(experts):
            inside |= {
                f"mlp.experts.{expert}.{name}": (EXPERT, HIDDEN)
                for name in ("gate_proj", "up_proj")
            }
            inside[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, EXPERT)
    shapes = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(blocks)
        for name, shape in inside.items()
    }
    shapes |= {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
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


def measure(model: Path, arguments: argparse.Namespace, samples: int, limit: str) -> dict[str, Any]:
    """One run on so many samples of random tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.jsonl"
        lines = torch.randint(
            3, VOCAB, (samples, arguments.seq_len), generator=torch.Generator().manual_seed(1)
        ).tolist()
        ids.write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in lines))
        verb = (
            ["plan", "--ratios", arguments.ratios, "--pattern", "50%"]
            if arguments.ratios
            else ["prune"]
        )
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
        command += ["--method", arguments.method, *(["--max-memory", limit] if limit else [])]
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
    arguments = parser.parse_args()
    rows = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            make_checkpoint(model, blocks, arguments.experts)
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

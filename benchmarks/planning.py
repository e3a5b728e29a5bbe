"""What a run costs beside its arithmetic: a random mixture of many tiny linears, where forward
passes, methods and files take least.

    python benchmarks/planning.py                    # 48 layers of 128 experts: 18,624 linears
    python benchmarks/planning.py --layers 12 24 48  # does what is left grow with them?
    python benchmarks/planning.py --layers 12 --profile    # which functions it is

CPU seconds of one `compressor.prune` by stage, imports aside: forward passes and their statistics;
methods, measured errors and packing; files read and written, the report among them; the output
loaded as a loader does and its first block computed. `beside` is what is left: checking, planning,
progress, and whatever else looks at every linear.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from one_run import Stages

from compressor import prune
from compressor.bench.cpu_timing import processor
from compressor.calibration import capture
from compressor.checkpoint.reader import Reader
from compressor.engine import blocks
from compressor.formats.sparse24 import Sparse24
from compressor.model.linear import Linear
from compressor.model.skeleton import Skeleton
from compressor.run import pipeline
from compressor.run.recorder import Recorder
from compressor.run.witness import Witness

EXPERTS, HIDDEN, WIDTH, VOCAB = 128, 64, 32, 256
NAMED = ("forward", "method", "files", "output")


def mixture(layers: int, folder: Path) -> None:
    """A random Qwen3 mixture in bfloat16: 388 linears of 64 x 32 and the like in each layer."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, moe_intermediate_size=WIDTH,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_experts=EXPERTS, num_experts_per_tok=8, vocab_size=VOCAB, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.logging.disable_progress_bar()
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(
        folder, max_shard_size="20MB"
    )


def staged() -> Stages:
    """From now on the seconds of a run go to its stages."""
    stages = Stages()
    for owner, functions, stage in (
        (capture, ("run", "capture"), "forward"),
        (pipeline, ("check_agreement",), "forward"),
        (blocks, ("compress_weight", "finish"), "method"),
        (Linear, ("set",), "method"),
        (Sparse24, ("dense",), "method"),
        (Linear, ("read",), "files"),
        (Skeleton, ("load_block", "load_embeddings"), "files"),
        (capture.States, ("save", "forget"), "files"),
        (Reader, ("__init__",), "files"),
        (Recorder, ("store", "begin", "finish_block", "finish"), "files"),
        (Witness, ("check",), "output"),
        (pipeline, ("_samples",), "files"),
    ):
        for function in functions:
            stages.wrap(owner, function, stage)
    return stages


def measured(stages: Stages, layers: int, method: str, tokens: int, folder: Path) -> dict[str, Any]:
    """The seconds of one run by stage."""
    mixture(layers, folder / "model")
    ids = torch.randint(3, VOCAB, (tokens // 64, 64), generator=torch.Generator().manual_seed(1))
    text = folder / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    with stages.stage("beside"):
        report = prune(
            folder / "model", folder / "out", method=method, dataset=text, num_samples=len(ids),
            seq_len=64, device="cpu",
        )  # fmt: skip
    found = {"linears": len(report.linears), **stages.seconds}
    stages.seconds.clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[48])
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--tokens", type=int, default=1024, help="of the calibration")
    parser.add_argument("--profile", action="store_true", help="print what cProfile sees")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages = staged()
    with tempfile.TemporaryDirectory() as name:  # what is imported when it is first needed
        measured(stages, 1, options.method, options.tokens, Path(name))
    print(f"{options.method}, {options.tokens} tokens; torch {torch.__version__}, {processor()}")
    print(f"| linears | {' s | '.join(NAMED)} s | beside s | beside |\n|{'---:|' * 7}")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as name, cProfile.Profile() as profile:
            if not options.profile:
                profile.disable()
            row = measured(stages, layers, options.method, options.tokens, Path(name))
        total = sum(row[stage] for stage in (*NAMED, "beside"))
        cells = " | ".join(f"{row[stage]:.1f}" for stage in (*NAMED, "beside"))
        print(f"| {row['linears']:,} | {cells} | {row['beside'] / total:.1%} |", flush=True)
        if options.profile:
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()

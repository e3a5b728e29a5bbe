"""Which tokens should calibrate an expert: all of them, or those routed to it? Perplexity of a
small mixture, pruned both ways.

    # needs the canary models and texts; COMPRESS_SHARED names their folder
    python benchmarks/experts.py

There is no small trained mixture to be had, so one is made: each MLP of books-1m becomes eight
experts of which a router chooses two, the experts start as noisy copies, and the whole is trained
for a while on book passages until they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from common import SHARED
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressor.calibration import tokens
from compressor.config.recipe import Recipe
from compressor.evaluation import perplexity
from compressor.run.pipeline import prune
from compressor.runtime import load

EXPERTS, CHOSEN, SEQ = 8, 2, 256


def mixture(folder: Path) -> Any:
    """A Mixtral whose attention is that of the Llama in `folder` and whose experts are noisy copies
    of its MLPs.
    """
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {
        **dense.config.to_dict(),
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "sliding_window": None,
    }
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **settings), dtype=torch.float32
    )
    state = dense.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                parts = (
                    ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
                )
                whole = torch.cat(
                    [state[f"{name.split('.experts.')[0]}.{part}.weight"] for part in parts]
                )
                parameter.copy_(whole + 0.3 * whole.std() * torch.randn_like(parameter))
            elif not name.endswith("mlp.gate.weight"):
                parameter.copy_(state[name])
    return model


def train(model: Any, rows: Tensor, steps: int, batch: int = 8) -> None:
    """AdamW on rows `[n, seq]`; the usual loss that spreads tokens over the experts is on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps)
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = rows[torch.randint(len(rows), (batch,), generator=generator)]
        loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)


def passages(path: Path, folder: Path) -> Tensor:
    """Token rows `[n, SEQ]` of the passages in a .jsonl file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [
        token
        for line in path.read_text().splitlines()
        for token in tokenizer(json.loads(line)["text"])["input_ids"]
    ]
    return torch.tensor(ids[: len(ids) // SEQ * SEQ]).view(-1, SEQ)


def main() -> None:
    """Train, prune, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[4, 16, 64], help="calibration rows of 256 tokens"
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began, source = time.time(), SHARED / "models" / "books-1m"
    model = mixture(source)
    train(model, passages(SHARED / "data" / "books-calib.jsonl", source), options.steps)
    test = tokens.evaluation_rows(
        str(SHARED / "data" / "books-test.jsonl"), source, model.config.vocab_size, seq_len=SEQ
    )[:256]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model.eval().save_pretrained(place / "model")
        AutoTokenizer.from_pretrained(source).save_pretrained(place / "model")
        seconds = time.time() - began
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, {options.steps} "
            f"steps in {seconds:.0f} s"
        )
        print(f"dense: {perplexity(load(place / 'model'), test):.2f}\n")
        print(
            "| method | calibration tokens | all | routed | fewest tokens of an expert, routed "
            "|\n|---|---:|---:|---:|---:|"
        )
        for method in ("wanda", "sparsegpt"):
            for samples in options.samples:
                scores, fewest = [], 0
                for expert_tokens in ("all", "routed"):
                    out = place / f"{method}-{samples}-{expert_tokens}"
                    settings = {
                        "dataset": str(SHARED / "data" / "books-calib.jsonl"),
                        "num_samples": samples,
                        "seq_len": SEQ,
                    }
                    report = prune(
                        Recipe(
                            str(place / "model"),
                            method=method,
                            expert_tokens=expert_tokens,
                            **settings,
                        ),
                        out,
                    )
                    fewest = min(row.tokens or 0 for row in report.linears)
                    scores.append(perplexity(load(out), test))
                print(
                    f"| {method} | {samples * SEQ} | {scores[0]:.2f} | {scores[1]:.2f} | {fewest} "
                    f"|",
                    flush=True,
                )


if __name__ == "__main__":
    main()

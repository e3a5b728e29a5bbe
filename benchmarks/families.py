"""What works with which family: the table of docs/families.md, from tiny random checkpoints.

python -m benchmarks.families                # all of them, a few minutes on a CPU
python -m benchmarks.families llama mixtral
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from compressor.calibration import capture
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import CompressError
from compressor.model.skeleton import Skeleton
from compressor.run.pipeline import prune
from compressor.runtime import load
from tests.families import EVERY, build

IDS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
ARMOR = {"block_size": 8, "overhead": 0.9, "iterations": 1, "finish": 0}


@torch.no_grad()
def streamed(folder: Path) -> tuple[str, str, int]:
    """Whether block by block gives the bits of from_pretrained, where the blocks are, and how many
    experts each has.
    """
    skeleton, cpu = Skeleton(Reader(folder)), torch.device("cpu")
    states = capture.capture(skeleton, IDS, cpu)
    experts = 0
    for index, arguments in enumerate(states.arguments):
        block = skeleton.load_block(index, cpu)
        states.hidden = [capture.run(block, hidden, arguments) for hidden in states.hidden]
        experts = max(
            experts,
            len({linear.module.expert for linear in skeleton.linears(index) if linear.experts}),
        )
        skeleton.free_block(index)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    caught: list[Any] = []
    whole.get_submodule(skeleton.path)[-1].register_forward_hook(
        lambda module, args, output: caught.append(output)
    )
    whole(input_ids=IDS, use_cache=False)
    expected, found = (
        caught[0][0] if isinstance(caught[0], tuple) else caught[0],
        torch.cat([batch.hidden for batch in states.hidden]),
    )
    same = (
        "exact" if torch.equal(expected, found) else f"off by {(expected - found).abs().max():.2g}"
    )
    return same, skeleton.path, experts


def pruned(folder: Path, rows: Path, method: str, place: Path) -> str:
    """What pruning gives: forms, counted, or the refusal; raises where a reloaded model differs
    from itself saved again.
    """
    settings: dict[str, Any] = {
        "dataset": str(rows),
        "num_samples": 8,
        "seq_len": 32,
        "options": ARMOR if method == "armor" else {},
    }
    try:
        report = prune(Recipe(str(folder), method=method, **settings), place / method)
    except CompressError as error:
        return f"refused: {str(error).split(':')[0]}"
    model = load(place / method)
    model.save_pretrained(place / f"{method}-again")
    with torch.no_grad():
        assert torch.equal(
            model(IDS, use_cache=False).logits,
            load(place / f"{method}-again")(IDS, use_cache=False).logits,
        ), f"{folder} {method}"
    counts = Counter("in place" if row.format == "dense" else row.format for row in report.linears)
    return ", ".join(f"{count} {form}" for form, count in sorted(counts.items()))


def main() -> None:
    """Print one row per family."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, CPU\n")
    print(
        "| family | blocks | experts | streamed, bfloat16 | float32 | wanda 2:4 | armor "
        "|\n|---|---|---:|---|---|---|---|"
    )
    for family in sys.argv[1:] or EVERY:
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            rows = place / "rows.jsonl"
            rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS.tolist()))
            half, path, experts = streamed(build(family, place / "half"))
            folder = build(family, place / "full", torch.float32)
            full, *_ = streamed(folder)
            cells = [
                family,
                f"`{path}`",
                str(experts or ""),
                half,
                full,
                *(pruned(folder, rows, method, place) for method in ("wanda", "armor")),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

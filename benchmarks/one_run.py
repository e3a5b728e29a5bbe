"""One measured process of benchmarks/compressing.py, which starts it and reads what it writes.

    python one_run.py compress METHOD[+REFINEMENT] MODEL IDS SAMPLES SEQ_LEN FOLDER
    PEER/bin/python one_run.py peer METHOD MODEL IDS SAMPLES SEQ_LEN FOLDER
    python one_run.py forward DTYPE MODEL IDS SAMPLES SEQ_LEN FOLDER

IDS is a file of JSON lines with `input_ids`. Into FOLDER/run.json go the CPU seconds of the work by
stage, without those of the imports before it. For the peer, and for the plain forward passes,
nothing of compress is imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCH_TOKENS = 2048  # of the plain forward passes: as compress batches them


class Stages:
    """CPU seconds by stage; what a stage calls that is a stage of its own does not count for it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack = ["other"]
        self._since = time.process_time()

    def _switch(self) -> None:
        now, stage = time.process_time(), self._stack[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside the `with`, time goes to `name`."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Have the time of `owner.function` go to the stage `name`."""
        inner: Callable[..., Any] = getattr(owner, function)

        def timed(*positional: Any, **keywords: Any) -> Any:
            with self.stage(name):
                return inner(*positional, **keywords)

        setattr(owner, function, timed)


def token_rows(path: Path, samples: int) -> list[list[int]]:
    """The first rows of a file of token ids."""
    lines = path.read_text().splitlines()[:samples]
    return [json.loads(line)["input_ids"] for line in lines]


def compress(method: str, model: str, ids: Path, samples: int, seq_len: int, folder: Path) -> Any:
    """A run of compress; its stages."""
    import compressor
    from compressor.calibration import capture
    from compressor.engine import blocks, one_linear
    from compressor.methods import FACTORIZATIONS
    from compressor.model.linear import Linear
    from compressor.model.skeleton import Skeleton
    from compressor.run.recorder import Recorder
    from compressor.stats import InputStats

    stages = Stages()
    stages.wrap(Skeleton, "load_block", "read")
    stages.wrap(Linear, "read", "read")
    stages.wrap(capture, "run", "forward")
    stages.wrap(InputStats, "update", "statistics")
    stages.wrap(blocks, "compress_weight", "method")
    stages.wrap(one_linear, "output_error", "error")
    stages.wrap(blocks, "finish", "write")
    for function in ("store", "finish_block", "finish", "begin"):
        stages.wrap(Recorder, function, "write")
    name, _, refine = method.partition("+")
    asked: dict[str, Any] = {"method": name, "dataset": str(ids), "num_samples": samples}
    asked |= {"refine": refine} if refine else {}
    make = compressor.prune
    if name in FACTORIZATIONS:
        make, asked = compressor.lowrank, asked | {"keep": "60%"}
    with stages.stage("other"):
        make(model, str(folder / "out"), seq_len=seq_len, device="cpu", **asked)
    return stages.seconds


def peer(method: str, model: str, ids: Path, samples: int, seq_len: int, folder: Path) -> Any:
    """The same by llm-compressor: 2:4 in every linear of the blocks, saved dense as it does."""
    import torch
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers import pruning  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    modifier = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}[method]
    recipe = getattr(pruning, modifier)(
        sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"]
    )
    rows = [{"input_ids": torch.tensor(row)} for row in token_rows(ids, samples)]
    stages = Stages()
    with stages.stage("other"):
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
            dataset=DataLoader(rows, batch_size=1),  # type: ignore[arg-type]  # as its own are
            recipe=[recipe],
            num_calibration_samples=samples,
            max_seq_length=seq_len,
            pipeline="sequential",
            output_dir=str(folder / "out"),
        )
    return stages.seconds


def forward(dtype: str, model: str, ids: Path, samples: int, seq_len: int, folder: Path) -> Any:
    """The floor: every block on every batch twice, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).base_model
    rows = torch.tensor(token_rows(ids, samples))
    stages = Stages()
    with torch.no_grad():
        for batch in rows.split(max(1, BATCH_TOKENS // seq_len)) * 2:
            with stages.stage("forward"):
                decoder(input_ids=batch, use_cache=False)
    return stages.seconds


def main() -> None:
    kind, what, model, ids, samples, seq_len, folder = sys.argv[1:]
    run = {"compress": compress, "peer": peer, "forward": forward}[kind]
    stages = run(what, model, Path(ids), int(samples), int(seq_len), Path(folder))
    seconds = {name: round(value, 3) for name, value in stages.items()}
    found = {"work": round(sum(stages.values()), 3), "stages": seconds}
    Path(folder, "run.json").write_text(json.dumps(found | {"io": _io()}))


def _io() -> dict[str, int]:
    """Bytes that this process had read from and written to disks, as Linux counts them."""
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.exists() else []
    counts = dict(line.split(": ") for line in lines)
    return {name: int(counts[name]) for name in ("read_bytes", "write_bytes") if name in counts}


if __name__ == "__main__":
    main()

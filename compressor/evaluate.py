"""Scores of a model: token perplexity as in the papers, and lm-eval tasks. Results have lm-eval's JSON schema.

Perplexity is exp(mean cross-entropy over all predicted tokens) over non-overlapping windows; each window is scored on its
own, its first token is context only. It is not lm-eval's word perplexity, which normalises by words and carries context over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor import data
from compressor.checkpoint import Reader, resolve
from compressor.errors import DataError, UsageError
from compressor.report import versions

METRIC = "token_perplexity,none"
_BATCH_TOKENS = 4096  # tokens in one forward pass: bounds the logits


def load_model(
    model: str, *, device: str, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Path]:
    """A plain or compressed checkpoint, ready to be scored, and its folder. Raises CheckpointError."""
    import compressor.runtime  # makes from_pretrained understand compressed folders

    folder = resolve(model, revision)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    return compressor.runtime.load(folder, dtype=kind, trust_remote_code=trust_remote_code).to(device), folder


@torch.no_grad()
def perplexity(model: Any, rows: Sequence[Tensor], progress: Callable[[int, int], None] = lambda done, total: None) -> float:
    """exp of the mean token cross-entropy over `rows`, int64 `[seq]` each; logits are taken in float32."""
    loss, tokens, done = 0.0, 0, 0
    while done < len(rows):
        length = len(rows[done])
        most = max(1, _BATCH_TOKENS // length)
        batch = [row for row in rows[done : done + most] if len(row) == length]
        ids = torch.stack(batch).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
        done += len(batch)
        progress(done, len(rows))
    return math.exp(min(loss / tokens, 700.0))


def evaluate(
    model: str,
    *,
    datasets: Sequence[str] = (),
    tasks: Sequence[str] = (),
    text_from: str | None = None,
    include_path: Path | None = None,
    seq_len: int = 0,
    num_samples: int = 32,
    seed: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Score one model.

    Args:
        model: folder or Hub id, plain or compressed.
        datasets: see `compressor.data`; `self` is text that `text_from` (or the model) writes with `seed`.
        tasks: names of lm-eval tasks; `include_path` holds further task files and then no others are scanned for.
        seq_len: window of the perplexity; 0 stands for min(2048, the model's limit).
        limit: at most so many rows, and examples per task.

    Returns:
        A dictionary in lm-eval's schema: `results`, `configs`, `versions`, `n-samples`, `config`, …
    """
    started = time.perf_counter()
    for name, value, least in (
        ("seq-len", seq_len or 2, 2),
        ("num-samples", num_samples, 1),
        ("limit", 1 if limit is None else limit, 1),
        ("seed", seed, 0),
    ):
        if value < least or value >= 1 << 63:
            raise UsageError(f"{name} is {value}; accepted: {least} or more")
    for dataset in datasets:
        data.check_dataset(dataset)
    loaded, folder = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    bound = data.context_length(loaded.config)
    if seq_len and bound and seq_len > bound:
        raise UsageError(f"seq-len {seq_len} is longer than the {bound} tokens this model was made for")
    window = seq_len or min(2048, bound or 2048)
    found: dict[str, Any] = {key: {} for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")}
    if tasks:
        found.update(_run_tasks(loaded, folder, tasks, include_path, limit, num_fewshot, batch_size))
    for dataset in datasets:
        if dataset == "self":
            writer = resolve(text_from or model)
            rows = list(data.sample_from_model(writer, num_samples=num_samples, seq_len=window, seed=seed, device=device))
        else:
            rows = data.evaluation_rows(dataset, folder, loaded.config.get_text_config().vocab_size, seq_len=window)
        rows = rows[: limit or len(rows)]
        if bound and max(map(len, rows)) > bound:
            raise DataError(f"{dataset} has rows of {max(map(len, rows))} tokens, this model was made for {bound}")
        name = "self" if dataset == "self" else Path(dataset).stem
        found["results"][name] = {"alias": name, METRIC: perplexity(loaded, rows, progress)}
        found["configs"][name] = {"task": name, "dataset_path": dataset, "output_type": "token_perplexity", "window": window}
        found["versions"][name] = 1
        found["n-shot"][name] = 0
        found["higher_is_better"][name] = {"token_perplexity": False}
        found["n-samples"][name] = {"original": len(rows), "effective": len(rows)}
    stored = Reader(folder)
    settings = {
        "model": "compress-llm",
        "model_args": {"pretrained": model},
        "limit": limit,
        "num_fewshot": num_fewshot,
        "seed": seed,
    }
    found["config"] = {
        **settings,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": device,
        "model_bytes": stored.nbytes,
    }
    found["model_name"], found["versions_of"] = model, versions()
    found["total_evaluation_time_seconds"] = round(time.perf_counter() - started, 3)
    return found


def _run_tasks(
    model: Any,
    folder: Path,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """lm-eval's results for `tasks`. Raises UsageError for unknown tasks, DataError where their data cannot be had."""
    try:
        import lm_eval
        from lm_eval.models import huggingface
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError("--tasks needs lm-eval: pip install 'compress-llm[eval]'") from None
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path} is not a folder")
    manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=include_path is None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(
            f"unknown task {unknown[0]!r}; `lm-eval ls tasks` lists the known ones, --include-path adds a folder of task files"
        )
    adapt: Any = huggingface.HFLM  # its decorators hide the parameters from type checkers, here and below
    run: Any = lm_eval.simple_evaluate
    length = data.context_length(model.config)
    adapter = adapt(pretrained=model, tokenizer=data.load_tokenizer(folder), batch_size=batch_size, max_length=length)
    try:
        found = run(
            model=adapter,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError) as error:
        raise DataError(f"the data of {', '.join(tasks)} could not be read: {' '.join(str(error).split())[:300]}") from None
    assert found is not None
    return {key: value for key, value in found.items() if key != "samples"}


def table(scored: dict[str, dict[str, Any]]) -> str:
    """A markdown table, one column per model, one row per metric; bytes first.

    Args:
        scored: heading of the column -> what `evaluate` returned.
    """
    short = [Path(name).name for name in scored]
    rows = [["", *(short if len(set(short)) == len(short) else scored)], []]
    sizes = [result["config"]["model_bytes"] for result in scored.values()]
    rows.append(["size (MB)", *[f"{size / 1e6:.2f}" for size in sizes]])
    metrics = dict.fromkeys(
        (task, metric)
        for result in scored.values()
        for task, values in result["results"].items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    )
    for task, metric in metrics:
        arrow = "↑" if next(iter(scored.values()))["higher_is_better"].get(task, {}).get(metric.split(",")[0], True) else "↓"
        cells = [result["results"].get(task, {}).get(metric) for result in scored.values()]
        rows.append(
            [
                f"{task} {metric.split(',')[0].replace('_', ' ')} {arrow}",
                *["-" if cell is None else f"{cell:.4g}" for cell in cells],
            ]
        )
    widths = [max(len(row[column]) for row in rows if row) for column in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rows[1] = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join(map(line, rows))

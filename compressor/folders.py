"""What the package does with checkpoints that are there: score, inspect, pack, unpack, verify and
publish them. `compressor` exports these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from compressor.config.keywords import (
    as_path,
    as_text,
    as_texts,
    check_kinds,
    check_something_to_score,
)
from compressor.errors import UsageError

if TYPE_CHECKING:
    from compressor.publish.hub import Pushed
    from compressor.tools.pack import Packed


def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    baseline: str | Path | Sequence[str | Path] | None = None,
    dataset: str | Path | Sequence[str | Path] | None = None,
    text_column: str | None = None,
    tasks: str | Sequence[str] | None = None,
    include_path: str | Path | None = None,
    seq_len: int = 0,
    num_samples: int = 32,
    seed: int = 1,
    calibration: str | Path = "self",
    calibration_samples: int = 128,
    kl: bool = True,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    cache: bool = True,
    server: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score models side by side: perplexity, KL divergence from the baseline, lm-eval tasks, bytes.

    The scores of a local folder are stored beside it, in `<folder>.eval.json`. What is known is
    kept.

    Args:
        models: folders or Hub ids, compressed or plain.
        baseline: what they are compared with, such as the original; beside it "int4" and "int3":
            it is scored with the weights of its decoder linears rounded to so many bits as well.
        dataset: perplexity on .txt, .jsonl or .parquet files, Hub ids, or "self".
        text_column: field of the records that has the text, or a chat.
        tasks: of lm-eval.
        include_path: folder of further lm-eval task files.
        seq_len: window of the perplexity; 0: min(2048, the model's limit).
        num_samples: sequences sampled for "self".
        seed: of "self".
        calibration: text for the GPTQ of "int4" and "int3", a dataset as for `prune`.
        calibration_samples: its rows of a window each.
        kl: KL divergence from the baseline; both models are in memory.
        limit: at most so many rows, and examples per task.
        num_fewshot: examples in the prompt of each task.
        batch_size: of the tasks.
        device: "auto", "cpu", "cuda", "cuda:1", …
        dtype: "auto", "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code that a checkpoint brings.
        cache: take numbers that are known from the cache.
        server: URL of a server of the one model, such as vLLM's: its perplexity as well.
        progress: called after each step with its name, how many are done, of how many.

    Returns:
        Model as it was given -> scores in lm-eval's schema: `results`, `configs`, `versions`,
        `n-samples`, `config`, …; the baseline among them, and what it is when rounded as
        "int4 nearest", "int4 GPTQ", …

    Raises:
        compressor.errors.CompressError: one clear line.
    """
    from compressor.config.recipe import DTYPES, check_one_of

    names, datasets = as_texts("models", models), as_texts("dataset", dataset)
    chosen = as_texts("tasks", tasks)
    if not names:
        raise UsageError("`models` names none")
    check_something_to_score(datasets, chosen)
    check_kinds(int, seq_len=seq_len, num_samples=num_samples, seed=seed, batch_size=batch_size)
    check_kinds(int, calibration_samples=calibration_samples)
    check_kinds((int, NoneType), limit=limit, num_fewshot=num_fewshot)
    check_kinds(bool, kl=kl, trust_remote_code=trust_remote_code, cache=cache)
    check_kinds(str, device=device, dtype=dtype)
    check_kinds((str, NoneType), text_column=text_column, server=server)
    check_one_of("dtype", dtype, DTYPES)
    from compressor.evaluation import score, split_baselines
    from compressor.run.pipeline import choose_device

    original, rounded = split_baselines(as_texts("baseline", baseline), names)
    settings: dict[str, Any] = {
        "rounded": rounded, "calibration": as_text("calibration", calibration),
        "calibration_samples": calibration_samples,
        "datasets": datasets, "text_column": text_column or "", "tasks": chosen,
        "include_path": None if include_path is None else as_path("include_path", include_path),
        "divergence": kl, "seq_len": seq_len, "num_samples": num_samples, "seed": seed,
        "limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size,
        "device": str(choose_device(device)), "dtype": dtype,
        "trust_remote_code": trust_remote_code, "cached": cache,
    }  # fmt: skip
    if progress:
        settings["progress"] = progress
    return score(names, baseline=original, server=server, **settings)


def inspect(model: str | Path) -> dict[str, Any]:
    """What the headers and the records of a checkpoint say, without torch.

    Args:
        model: any checkpoint folder, or a Hub id.

    Returns:
        Plain data, what `compress inspect --json` prints: `folder`, `architecture`, `shards`,
        `tensors`, `bytes`, `dense_bytes`, `ratio`, and for each of the `linears` its `name`,
        `shape`, `format`, `sparsity`, `bytes`, `dense_bytes` and `ratio`.

    Raises:
        compressor.errors.CheckpointError: it is no checkpoint, or its parts do not belong together.
    """
    from compressor.checkpoint.dequantised import open_model
    from compressor.checkpoint.download import resolve
    from compressor.tools.describe import describe

    return describe(open_model(resolve(as_text("model", model))))


def pack(folder: str | Path, output: str | Path, *, trust_remote_code: bool = False) -> Packed:
    """Pack a checkpoint that is 2:4 already, made by any tool that stores zeros in place. No
    calibration, no weight changes.

    Args:
        folder: a dense checkpoint with 2:4 zeros in place.
        output: folder to be made; it must not exist.
        trust_remote_code: run Python code that the checkpoint brings.

    Returns:
        Which linears were `packed`, and which were `left_dense`, with reasons.

    Raises:
        compressor.errors.CompressError: no linear is 2:4, or the output cannot be written.
    """
    source, target = as_path("folder", folder), as_path("output", output)
    check_kinds(bool, trust_remote_code=trust_remote_code)
    from compressor.tools.pack import pack as run

    return run(source, target, trust_remote_code=trust_remote_code)


def unpack(folder: str | Path, output: str | Path) -> int:
    """Turn a packed checkpoint back into a plain dense one that every tool reads.

    Args:
        folder: a packed checkpoint.
        output: folder to be made; it must not exist.

    Returns:
        How many linears are dense again.

    Raises:
        compressor.errors.CompressError: nothing is packed in it, or it is damaged.
    """
    source, target = as_path("folder", folder), as_path("output", output)
    from compressor.tools.unpack import unpack as run

    return run(source, target)


def verify(
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Check a finished folder: checksums, headers, patterns, packed tensors, finite numbers, and
    that config, parameters and tokenizer load.

    Args:
        folder: that this package made.
        trust_remote_code: run Python code that the checkpoint brings.
        progress: told how many tensors are checked of how many.

    Returns:
        How many `files`, `tensors` and `linears` were checked, and `problems`, a list of lines;
        empty for a sound folder.

    Raises:
        compressor.errors.CheckpointError: it is no checkpoint folder at all.
    """
    source = as_path("folder", folder)
    check_kinds(bool, trust_remote_code=trust_remote_code)
    from compressor.tools.verify import verify as run

    told: dict[str, Any] = {"progress": progress} if progress else {}
    return run(source, trust_remote_code=trust_remote_code, **told)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    base_model: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Pushed:
    """Publish a compressed folder on the Hub, with a model card made from its records and its
    stored scores.

    Args:
        folder: that `prune` or `lowrank` made.
        repo: "org/name"; made if need be.
        private: make it private.
        create_pr: open a pull request instead.
        base_model: the original on the Hub; by default the recipe's model.
        progress: told the name of each large file before it is sent, its number and how many there
            are.

    Returns:
        The commit's `url`, that of the `pull_request`, the files `sent`, `unchanged` and `removed`.

    Raises:
        compressor.errors.CompressError: the folder cannot be published, or the Hub refused it;
        nothing is published then.
    """
    source = as_path("folder", folder)
    check_kinds(str, repo=repo, base_model=base_model)
    check_kinds(bool, private=private, create_pr=create_pr)
    from compressor.publish import hub
    from compressor.publish.files import prepare

    for name in (repo, *([base_model] if base_model else [])):
        hub.check_repo(name)
    what = prepare(source, repo, base_model, hub.published_licence)
    told: dict[str, Any] = {"progress": progress} if progress else {}
    message = f"{source.resolve().name}, by compress-llm"
    return hub.push(what, repo, private=private, create_pr=create_pr, message=message, **told)

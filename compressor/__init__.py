"""compress: post-training compression of Hugging Face causal language models.

    compressor.prune("org/model", "out", method="sparsegpt", pattern="2:4")
    model = compressor.load("out")

Importing this package is cheap: torch and transformers are imported by the functions that need
them.
`import compressor.runtime` makes transformers' own `from_pretrained` understand compressed folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressor.progress import Progress
    from compressor.records.report import Report

__all__ = ["load", "prune"]


def prune(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    revision: str | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    refine: str | None = None,
    refine_options: Mapping[str, Any] | None = None,
    refine_only: Sequence[str] | None = None,
    tune: int | None = None,
    pattern: str | None = None,
    ratios: str | None = None,
    dense_fraction: str | None = None,
    ratio_options: Mapping[str, Any] | None = None,
    keep: str | None = None,
    ranks: str | None = None,
    rank_options: Mapping[str, Any] | None = None,
    plan: str | Path | None = None,
    format: str | None = None,
    dataset: str | Path | None = None,
    text_column: str | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    expert_tokens: str | None = None,
    ignore: Sequence[str] | None = None,
    trust_remote_code: bool | None = None,
    device: str = "auto",
    max_memory: str = "",
    progress: Progress | None = None,
) -> Report:
    """Compress the checkpoint `model` into the new folder `output`; what `compress prune` and
    `compress lowrank` do.

    A run that was cut off goes on where it was when the same is asked for again.

    A setting that is None is that of the `recipe`, or the default where the recipe does not have it
    either.

    Args:
        model: folder or Hub id.
        output: folder to be made; it must not exist. `<output>.report.json` is written beside it.
        recipe: TOML file, or the name of a bundled recipe such as "armor-24".
        revision: branch, tag or commit of a Hub id.
        method: "magnitude", "wanda" (default), "nowag", "sparsegpt" or "armor"; with `keep` "kfac",
            "svd_llm", "asvd", "welore" or "svd".
        options: of the method, such as {"damp": 0.05}.
        refine: "dsnot", "lsq", "swap" or "admm"; nothing by default.
        refine_options: of the refinement, such as {"damping": 0.1}.
        refine_only: globs over the names of linears that the refinement is for; all by default.
        tune: epochs of training the kept weights, block by block; default 0.
        pattern: n:m (n of every m weights are kept) or a sparsity such as "50%"; default "2:4".
        ratios: "uniform", "ecoflap", "owl" or "curve": shares out the zeros of a sparsity; nothing
            by default.
        dense_fraction: such as "10%": of the weights, may stay dense under n:m.
        ratio_options: of either, such as {"max_sparsity": 0.8}.
        keep: such as "70%": of the linears' parameters, by thin factors in place of a pattern.
        ranks: "uniform", "welore" or "threshold": shares them out; by default what suits the
            method.
        rank_options: of the ranks, such as {"align": 16}.
        plan: file that says what every linear becomes, in place of `pattern`.
        format: "packed" (default), or "dense" for zeros in place.
        dataset: calibration text: a .txt, .jsonl or .parquet file, a Hub data set, or "self"
            (default), text the model writes. Records have `text`, a chat in `messages` or
            `conversations`, or ready `input_ids`.
        text_column: field of the records that has the text or the chat, by another name.
        num_samples: calibration sequences; default 128.
        seq_len: tokens in each; default min(2048, the model's limit).
        seed: of the calibration and of everything random after it; default 0.
        dtype: of the forward passes: "auto" (default, the checkpoint's), "float32", "bfloat16",
            "float16".
        expert_tokens: what calibrates the experts of a mixture: the tokens "routed" to each
            (default) or "all" of them.
        ignore: globs over the names of linears that stay dense.
        trust_remote_code: run Python code that the checkpoint brings; default False.
        device: "auto", "cpu", "cuda", "cuda:1", …
        max_memory: of the host, such as "8GB": hidden states that do not fit rest on disk, Gram
            matrices are built in groups.
        progress: called after each step, see `compressor.progress.Progress`.

    Returns:
        The report that is also in the folder, with the cost of this run under `run`.

    Raises:
        compressor.errors.CompressError: one clear line; nothing is left behind but what a run can
        go on from.
    """
    from compressor.config.bundled_recipes import find
    from compressor.config.recipe import load, merge

    settings: dict[str, Any] = {
        "model": str(model), "revision": revision, "method": method, "options": options,
        "refine": refine,
        "refine_options": refine_options, "refine_only": refine_only, "tune": tune,
        "pattern": pattern, "ratios": ratios,
        "dense_fraction": dense_fraction, "ratio_options": ratio_options, "keep": keep,
        "ranks": ranks,
        "rank_options": rank_options, "plan": plan and str(plan), "format": format,
        "dataset": dataset and str(dataset), "text_column": text_column,
        "num_samples": num_samples, "seq_len": seq_len,
        "seed": seed, "dtype": dtype,
        "expert_tokens": expert_tokens, "ignore": ignore, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    for name in ("options", "refine_options", "ratio_options", "rank_options"):
        settings[name] = dict(settings[name]) if settings[name] else None
    for name in ("refine_only", "ignore"):
        settings[name] = None if settings[name] is None else list(settings[name])
    merged = merge(load(find(recipe)) if recipe else {}, settings, [])
    from compressor.progress import silent
    from compressor.run.pipeline import prune as run

    return run(
        merged, Path(output), device=device, max_memory=max_memory, progress=progress or silent
    )


def load(
    path: str | Path,
    *,
    runtime: str = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A compressed or plain checkpoint as a transformers causal language model, ready to generate.

    Args:
        path: folder or Hub id.
        runtime: "packed" (compute from the packed weights), "dense" (unpack them) or "auto" (what
            is faster).
        dtype: "auto" (the stored one), or the dtype to compute in.
        device_map: where the modules go, as for `from_pretrained`: "auto", "cuda", {"": "cuda:1"},
            …
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run Python code that the checkpoint brings.
        options: anything else that `AutoModelForCausalLM.from_pretrained` takes.

    Raises:
        compressor.errors.CheckpointError: weights are missing, damaged or not listed in
        config.json. compressor.errors.UsageError: an unknown `runtime`.
    """
    from compressor.runtime import load as run

    given = {"device_map": device_map, "revision": revision}
    chosen = {name: value for name, value in given.items() if value is not None}
    return run(
        path, runtime=runtime, dtype=dtype, trust_remote_code=trust_remote_code, **chosen, **options
    )

"""compress: post-training compression of Hugging Face causal language models.

    compressor.prune("org/model", "out", method="sparsegpt", pattern="2:4")
    model = compressor.load("out")

Importing this package is cheap: torch and transformers are imported by the functions that need them.
`import compressor.runtime` makes transformers' own `from_pretrained` understand compressed folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.report import Report

__all__ = ["load", "prune"]


def prune(model: str | Path, output: str | Path, *, device: str = "auto", max_memory: str = "", **settings: Any) -> Report:
    """Compress the checkpoint `model` (a folder or a Hub id) into the new folder `output`; a run that was cut off goes on.

    Args:
        model: what to compress.
        output: folder to be made.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        max_memory: of the host, such as `8GB`: hidden states that do not fit rest on disk.
        settings: fields of `compressor.recipe.Recipe`: method, pattern, format, dataset, num_samples, seq_len, seed,
            ignore, dtype, options, revision, trust_remote_code.

    Raises:
        compressor.errors.CompressError: one clear line; nothing is left behind but what a run can go on from.
    """
    from compressor.pipeline import prune as run
    from compressor.recipe import merge

    return run(merge({}, {"model": str(model), **settings}, []), Path(output), device=device, max_memory=max_memory)


def load(path: str | Path, **options: Any) -> Any:
    """A compressed or plain checkpoint as a transformers causal language model; `options` as for `from_pretrained`."""
    from compressor.runtime import load as run

    return run(path, **options)

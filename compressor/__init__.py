"""compress: post-training compression of Hugging Face causal language models.

    compressor.prune("org/model", "out", method="sparsegpt", pattern="2:4")
    model = compressor.load("out")

Each function does what the command of its name does; docs/library.md shows them. Whatever a user
can cause is a `compressor.errors.CompressError` of one line; a keyword that a function does not
have is a TypeError.

Importing this package is cheap: torch and transformers are imported by the functions that need
them. `import compressor.runtime` makes transformers' own `from_pretrained` understand compressed
folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from compressor.config.keywords import as_path, as_text, check_kinds, with_settings
from compressor.config.recipe import LowrankSettings, PlanSettings, PruneSettings
from compressor.folders import evaluate, inspect, pack, push, unpack, verify

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressor.progress import Progress
    from compressor.records.report import Report
    from compressor.run.plan_file import PlanFile

__all__ = [
    "evaluate",
    "inspect",
    "load",
    "lowrank",
    "pack",
    "plan",
    "prune",
    "push",
    "unpack",
    "verify",
]


@with_settings("prune", PruneSettings)
def prune(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    device: str = "auto",
    max_memory: str = "",
    progress: Progress | None = None,
    **settings: Unpack[PruneSettings],
) -> Report:
    """Prune the checkpoint `model` into the new folder `output`.

    A run that was cut off goes on where it was when the same is asked for again. A setting that is
    None is that of the `recipe`, or the default where the recipe does not have it either.

    Args:
        model: folder or Hub id.
        output: folder to be made; it must not exist. `<output>.report.json` is written beside it.
        recipe: TOML file, or the name of a bundled recipe such as "armor-24".
        device: "auto", "cpu", "cuda", "cuda:1", …
        max_memory: of the host, such as "8GB": hidden states that do not fit rest on disk, Gram
            matrices are built in groups. Default: half of what is free.
        progress: called after each step, see `compressor.progress.Progress`.
        settings:

    Returns:
        The report that is also in the folder, with the cost of this run under `run`.

    Raises:
        compressor.errors.CompressError: one clear line; nothing is left behind but what a run can
        go on from.
    """
    return _compress("prune", model, output, recipe, device, max_memory, progress, settings)


@with_settings("lowrank", LowrankSettings)
def lowrank(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    device: str = "auto",
    max_memory: str = "",
    progress: Progress | None = None,
    **settings: Unpack[LowrankSettings],
) -> Report:
    """Replace linears of the checkpoint `model` by weights of low rank, in the new folder
    `output`. Everything else is as for `prune`.

    Args:
        model: folder or Hub id.
        output: folder to be made; it must not exist. `<output>.report.json` is written beside it.
        recipe: TOML file, or the name of a bundled recipe such as "lowrank-70".
        device: "auto", "cpu", "cuda", "cuda:1", …
        max_memory: of the host, such as "8GB". Default: half of what is free.
        progress: called after each step, see `compressor.progress.Progress`.
        settings:

    Returns:
        The report that is also in the folder, with the cost of this run under `run`.

    Raises:
        compressor.errors.CompressError: one clear line; nothing is left behind but what a run can
        go on from.
    """
    return _compress("lowrank", model, output, recipe, device, max_memory, progress, settings)


def _compress(
    command: str,
    model: str | Path,
    output: str | Path,
    recipe: str | Path | None,
    device: str,
    max_memory: str,
    progress: Progress | None,
    settings: Mapping[str, Any],
) -> Report:
    from compressor.config.read import ask

    folder = as_path("output", output)
    check_kinds(str, device=device, max_memory=max_memory)
    asked = ask(command, as_text("model", model), recipe, settings)
    from compressor.progress import silent
    from compressor.run.pipeline import prune as run

    return run(asked, folder, device=device, max_memory=max_memory, progress=progress or silent)


@with_settings("plan", PlanSettings)
def plan(
    model: str | Path,
    output: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    device: str = "auto",
    max_memory: str = "",
    progress: Progress | None = None,
    **settings: Unpack[PlanSettings],
) -> PlanFile:
    """Choose what every linear of the checkpoint `model` becomes; nothing is compressed.

    Args:
        model: folder or Hub id.
        output: file to be made, for `plan=` of `prune` or `lowrank`; it must not exist. Without it
            nothing is written.
        recipe: TOML file, or the name of a bundled recipe.
        device: "auto", "cpu", "cuda", "cuda:1", …
        max_memory: of the host, such as "8GB". Default: half of what is free.
        progress: called after each step, see `compressor.progress.Progress`.
        settings:

    Returns:
        The plan: `linears` by name, what was `measured`, and the `text` of the file.

    Raises:
        compressor.errors.CompressError: one clear line.
    """
    from compressor.config.read import ask

    check_kinds(str, device=device, max_memory=max_memory)
    asked = ask("plan", as_text("model", model), recipe, settings)
    file = None if output is None else as_path("output", output)
    from compressor.run.plan_file import PlanFile, check_new_file

    if file:
        check_new_file(file)
    from compressor.progress import silent
    from compressor.run.pipeline import make_plan

    choice = make_plan(asked, device=device, max_memory=max_memory, progress=progress or silent)
    chosen = PlanFile.of(choice)
    if file:
        chosen.save(file)
    return chosen


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

"""`compress eval`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli import options
from compressor.cli.show import begin, scoring_progress


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…", help="Folders or Hub ids, compressed or plain.", show_default=False
        ),
    ],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="What they are compared with, shown first, such as the original; int4 or int3, "
            "given beside it, is what its weights rounded to so many bits would do.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Perplexity on a .txt, .jsonl or .parquet file, Hub id, or self; repeatable.",
            show_default=False,
        ),
    ] = None,
    text_column: options.TextColumn = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, separated by commas.", show_default=False)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further lm-eval task files.", show_default=False)
    ] = None,
    seq_len: Annotated[
        int, typer.Option(help="Window of the perplexity; 0: min(2048, the model's limit).")
    ] = 0,
    num_samples: Annotated[int, typer.Option(help="Sequences sampled for --dataset self.")] = 32,
    seed: Annotated[int, typer.Option(help="Of --dataset self.")] = 1,
    calibration: Annotated[
        str, typer.Option(help="Text for the GPTQ of int4 and int3, as --dataset of prune.")
    ] = "self",
    calibration_samples: Annotated[int, typer.Option(help="Its rows of a window each.")] = 128,
    kl: Annotated[
        bool,
        typer.Option(
            "--kl/--no-kl", help="KL divergence from the baseline; both models are in memory."
        ),
    ] = True,
    limit: Annotated[
        int | None,
        typer.Option(help="At most so many rows, and examples per task.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt of each task.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Of the tasks.")] = 8,
    device: options.Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw quality over size, .png or .svg; must not exist.", show_default=False
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Take numbers that are known from the cache.")
    ] = True,
    server: Annotated[
        str | None,
        typer.Option(
            help="URL of a server of the model, such as vLLM's: its perplexity beside the model's.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the JSON here as well; must not exist.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in lm-eval's schema instead of the table.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Score models side by side: perplexity, KL divergence from the baseline, lm-eval tasks, bytes.

    What is known is kept: an evaluation that was interrupted goes on, a further model costs that
        model only.
    The scores of a folder DIR are stored beside it, in DIR.eval.json.
    """
    from compressor.config.keywords import check_something_to_score
    from compressor.config.recipe import DTYPES, check_one_of
    from compressor.errors import OutputError

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    check_something_to_score(dataset or [], names)
    if output is not None and output.exists():
        raise OutputError(f"output {output} exists already; choose another with -o or remove it")
    if output is not None and not output.resolve().parent.is_dir():
        raise OutputError(
            f"output {output} cannot be written: {output.resolve().parent} is not a folder"
        )
    check_one_of("dtype", dtype, DTYPES)
    if plot is not None:
        from compressor.plots.quality_over_size import check_plot

        check_plot(plot)
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read when the libraries are imported
    begin(quiet, verbose)
    from compressor.evaluation import score, split_baselines, table
    from compressor.run.pipeline import choose_device

    where = str(choose_device(device))
    original, rounded = split_baselines(baseline or [], models)
    settings: dict[str, Any] = {
        "datasets": dataset or [], "text_column": text_column or "",
        "tasks": names, "divergence": kl, "include_path": include_path,
        "seq_len": seq_len,
        "num_samples": num_samples, "seed": seed, "limit": limit, "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "rounded": rounded, "calibration": calibration, "calibration_samples": calibration_samples,
        "device": where, "dtype": dtype, "trust_remote_code": trust_remote_code, "cached": cache,
    }  # fmt: skip
    with scoring_progress(quiet) as (progress, note):
        settings |= {"progress": progress, "note": note}
        scored = score(models, baseline=original, server=server, **settings)
    text = json.dumps(_as_json(scored, models, original), indent=1, default=str)
    if output is not None:
        from compressor.checkpoint.atomic import write_output

        write_output(output, f"{text}\n".encode())
    if plot is not None:
        from compressor.plots.quality_over_size import draw

        draw(scored, plot, baseline=original)
    print(text if as_json else table(scored))


def _as_json(
    scored: Mapping[str, Any], models: Sequence[str], original: str | None
) -> dict[str, Any]:
    """The scores of one model or of `models`, with those of the baseline, rounded and not."""
    found = dict(scored[models[0]]) if len(models) == 1 else {}
    if len(models) > 1:
        found["models"] = {name: scored[name] for name in models}
    if original:
        found["baseline"] = scored[original]
    if rounded := {name: scored[name] for name in scored if name not in (*models, original)}:
        found["rounded"] = rounded
    return found


evaluate.__doc__ = f"""{cleandoc(evaluate.__doc__ or "")}

[bold]Examples[/bold]

compress eval out --baseline org/model --dataset wikitext2-test.txt

compress eval out out-armor out-50 --baseline org/model --dataset wikitext2.txt --plot quality.png

compress eval out --baseline org/model --baseline int4 --dataset test.txt

compress eval out --tasks arc_easy,piqa --json -o scores.json"""

"""`compress bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli.show import err, out, quiet_libraries, table


def bench(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="A compressed checkpoint: its shapes, and decoding with it.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="OUTxIN of a linear to measure, such as 4096x14336; repeatable.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="Rows of x, separated by commas.")
    ] = "1,4,16,32,64,96,256,2048",
    batches: Annotated[
        str, typer.Option(help="Sequences decoded at once with DIR, separated by commas.")
    ] = "1,4,16",
    tokens: Annotated[int, typer.Option(help="Tokens decoded with DIR.", min=1)] = 128,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for JSON, CSV and a plot; must not exist.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the tables.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure the kernels on this GPU against dense cuBLAS, and decoding with a compressed
    checkpoint.

    [bold]Examples[/bold]

    compress bench --shape 4096x14336 --rows 1,16

    compress bench out -o speed
    """
    from compressor.errors import OutputError

    if output is not None and output.exists():
        raise OutputError(f"output {output} exists already; choose another with -o or remove it")
    counts, sizes = numbers(rows, "--rows"), numbers(batches, "--batches")
    shapes = [out_in(text) for text in shape or ()]
    from compressor.bench import report, timing

    device = timing.need_gpu()
    quiet_libraries(False)
    result = _run(
        folder,
        shapes,
        counts,
        sizes,
        tokens,
        device,
        lambda text: None if quiet else err.print(text, style="dim"),
    )
    if output is not None:
        report.write(output, result)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        for name in ("kernels", "decode"):
            _show(name, result.get(name, []))
        for sentence in report.verdicts(result):
            out.print(sentence)


def _run(
    folder: Path | None,
    shapes: list[tuple[int, int]],
    rows: list[int],
    batches: list[int],
    tokens: int,
    device: Any,
    say: Any,
) -> dict[str, Any]:
    import torch

    from compressor.bench import kernels, timing
    from compressor.checkpoint.reader import Reader

    reader = Reader(folder) if folder is not None else None
    say("measuring the bandwidth of a copy …")
    copied = timing.copy_bandwidth(device)
    result: dict[str, Any] = {
        "environment": timing.environment(device),
        "copy_gb_per_s": round(copied),
        "kernels": [],
    }
    for pair in shapes or (_shapes_of(reader) if reader is not None else kernels.SHAPES):
        say(f"measuring {pair[0]} x {pair[1]} …")
        result["kernels"] += kernels.measure_shape(
            pair, rows, kernels.OPS, torch.bfloat16, device, copied
        )
    if folder is not None:
        result |= _decode(folder, batches, tokens, device, say)
    return result


def _decode(folder: Path, batches: list[int], tokens: int, device: Any, say: Any) -> dict[str, Any]:
    import gc

    import torch

    import compressor
    from compressor.bench.decode import measure_model
    from compressor.runtime import runtimes

    rows, chosen = [], {}
    for label, runtime in (("dense", "dense"), ("compressed", "packed")):
        say(f"decoding, {label} …")
        model = compressor.load(folder, runtime=runtime, device_map={"": device})
        chosen = runtimes(model)
        rows += measure_model(model, label, tuple(batches), tokens=tokens)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return {"decode": rows, "runtime": chosen}


def _shapes_of(reader: Any) -> list[tuple[int, int]]:
    from compressor.tools.describe import describe

    shapes = [
        linear["shape"] for linear in describe(reader)["linears"] if linear["format"] != "dense"
    ]
    return sorted(
        {(shape[0], shape[1]) for shape in shapes if len(shape) == 2 and shape[1] % 4 == 0}
    )


def numbers(text: str, option: str) -> list[int]:
    """`1,4,16` as numbers. Raises UsageError, which names the option."""
    from compressor.errors import UsageError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UsageError(
            f"{option} is {text!r}; accepted: positive numbers separated by commas, such as 1,4,16"
        )
    return found


def out_in(text: str) -> tuple[int, int]:
    """`4096x14336` as out and in. Raises UsageError."""
    from compressor.errors import UsageError

    parts = text.lower().split("x")
    if (
        len(parts) != 2
        or not all(part.isdigit() and int(part) > 0 for part in parts)
        or int(parts[1]) % 4
    ):
        raise UsageError(
            f"--shape is {text!r}; accepted: OUTxIN with IN a multiple of 4, such as 4096x14336"
        )
    return int(parts[0]), int(parts[1])


def _show(name: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        names = list(dict.fromkeys(key for row in rows for key in row))
        text = {"op", "model", "dtype", "note"}
        shown = table(name, " ".join(key if key in text else f">{key}" for key in names))
        for row in rows:
            shown.add_row(*(str(row.get(key, "")) for key in names))
        out.print(shown)

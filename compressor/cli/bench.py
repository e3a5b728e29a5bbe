"""`compress bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.bench.model_shapes import MODELS
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
            help="OUTxIN of a linear to measure, such as 4096x14336; repeatable. Or a model with "
            f"random weights, and decoding with it: {', '.join(MODELS)}.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows of x, separated by commas; default: a choice from 1 on.", show_default=False
        ),
    ] = None,
    batches: Annotated[
        str, typer.Option(help="Sequences decoded at once, separated by commas; on a CPU one.")
    ] = "1,4,16",
    tokens: Annotated[int, typer.Option(help="Tokens decoded.", min=1)] = 128,
    seconds: Annotated[
        int, typer.Option(help="Seconds for each shape and dtype on a CPU, about.", min=1)
    ] = 20,
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
    """Measure packed linears against torch's dense ones, and decoding with a compressed checkpoint:
    on this GPU, or without one on this CPU.

    On a CPU so many threads are used as OMP_NUM_THREADS says.

    [bold]Examples[/bold]

    compress bench --shape 4096x14336 --rows 1,16

    compress bench --shape llama-1b

    compress bench out -o speed
    """
    from compressor.errors import OutputError

    if output is not None and output.exists():
        raise OutputError(f"output {output} exists already; choose another with -o or remove it")
    asked = _Asked(
        *_subject(folder, shape or []),
        rows=numbers(rows, "--rows") if rows is not None else None,
        batches=numbers(batches, "--batches"),
        tokens=tokens,
        seconds=seconds,
        say=lambda text: None if quiet else err.print(text, style="dim"),
    )
    import torch

    from compressor.bench import report

    quiet_libraries(False)
    result = _on_gpu(asked) if torch.cuda.is_available() else _on_cpu(asked)
    if output is not None:
        report.write(output, result)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        ran_on = (f"{name} {value}" for name, value in result["environment"].items() if value)
        out.print(", ".join(ran_on))
        for name in ("kernels", "decode"):
            _show(name, result.get(name, []))
        for sentence in report.verdicts(result):
            out.print(sentence)


@dataclass(frozen=True)
class _Asked:
    """`model` is a compressed folder or a name of MODELS, None where nothing is decoded; `shapes`
    are those to be measured, none: the device's own.
    """

    model: Path | str | None
    shapes: list[tuple[int, int]]
    rows: list[int] | None
    batches: list[int]
    tokens: int
    seconds: int
    say: Callable[[str], Any]


def _subject(
    folder: Path | None, shapes: list[str]
) -> tuple[Path | str | None, list[tuple[int, int]]]:
    """Model and shapes to measure. Raises UsageError and CheckpointError."""
    from compressor.bench.model_shapes import linears_of
    from compressor.errors import UsageError

    names = [text for text in shapes if text in MODELS]
    pairs = [out_in(text) for text in shapes if text not in MODELS]
    if len(names) + (folder is not None) > 1:
        raise UsageError(
            f"--shape {names[-1]} names a model, and one is decoded at a time; accepted: DIR or "
            "one model, and shapes such as 4096x14336"
        )
    if folder is not None:
        from compressor.checkpoint.reader import Reader

        return folder, pairs or _shapes_of(Reader(folder))
    return (names[0], pairs or linears_of(names[0])) if names else (None, pairs)


def _on_gpu(asked: _Asked) -> dict[str, Any]:
    import torch

    from compressor.bench import kernels, timing

    device = timing.need_gpu()
    asked.say("measuring the bandwidth of a copy …")
    copied = timing.copy_bandwidth(device)
    result: dict[str, Any] = {
        "environment": timing.environment(device),
        "copy_gb_per_s": round(copied),
        "kernels": [],
    }
    for pair in asked.shapes or kernels.SHAPES:
        asked.say(f"measuring {pair[0]} x {pair[1]} …")
        result["kernels"] += kernels.measure_shape(
            pair, asked.rows or kernels.ROWS, kernels.OPS, torch.bfloat16, device, copied
        )
    if asked.model is not None:
        result |= _decode(asked.model, asked.batches, asked.tokens, device, asked.say)
    return result


def _on_cpu(asked: _Asked) -> dict[str, Any]:
    import torch

    from compressor.bench import cpu_decode, cpu_linears, cpu_timing
    from compressor.errors import CompressError
    from compressor_kernels.cpu.build import kernels

    if problem := kernels().problem:
        raise CompressError(f"no CUDA device is here, and {problem}: nothing was measured")
    asked.say("measuring the bandwidth of reading …")
    read = cpu_timing.read_bandwidth()
    result: dict[str, Any] = {
        "environment": cpu_timing.environment(),
        "read_gb_per_s": round(read, 1),
        "kernels": [],
    }
    for pair in asked.shapes or cpu_linears.SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            asked.say(f"measuring {pair[0]} x {pair[1]} in {str(dtype)[6:]} …")
            result["kernels"] += cpu_linears.measure_shape(
                pair, asked.rows or cpu_linears.ROWS, dtype, read, asked.seconds
            )
    if asked.model is not None:
        asked.say("decoding, dense and compressed in turn …")
        result["decode"] = cpu_decode.measure_model(str(asked.model), asked.tokens)
    return result


def _decode(
    source: Path | str, batches: list[int], tokens: int, device: Any, say: Any
) -> dict[str, Any]:
    import gc

    import torch

    import compressor
    from compressor.bench.decode import measure_model
    from compressor.bench.model_shapes import random_model
    from compressor.runtime import runtimes

    rows, chosen = [], {}
    for label, runtime in (("dense", "dense"), ("compressed", "packed")):
        say(f"decoding, {label} …")
        if isinstance(source, str):
            model = random_model(source, runtime, device)
        else:
            model = compressor.load(source, runtime=runtime, device_map={"": device})
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
            f"--shape is {text!r}; accepted: OUTxIN with IN a multiple of 4, such as 4096x14336; "
            f"or {', '.join(MODELS)}"
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

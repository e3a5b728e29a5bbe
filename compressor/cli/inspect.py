"""`compress inspect`: everything the headers say, without torch."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer

from compressor.cli.show import out, size, table, tell


def inspect(
    model: Annotated[
        str, typer.Argument(help="Any checkpoint folder, or a Hub id.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show architecture, shards, and format, sparsity and bytes of every linear.

    [bold]Example[/bold]

    compress inspect out
    """
    from compressor.checkpoint.reader import Reader, resolve

    found = describe(Reader(resolve(model)))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)


def describe(reader: Any) -> dict[str, Any]:
    """What the headers, config.json and report.json of a checkpoint say. Sparsity is known where a
    report is; factors have none.
    """
    from compressor.checkpoint.packed_config import packed_modules
    from compressor.checkpoint.reader import ITEM_BITS, read_json
    from compressor.errors import CheckpointError

    modules = packed_modules(reader.config)
    report = reader.folder / "report.json"
    try:
        rows = read_json(report).get("linears", []) if report.is_file() else []
        sparsity = {row["name"]: float(row["sparsity"]) for row in rows}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise CheckpointError(f"{report} is no report of this package") from None
    linears = []
    for name, entry in modules.items():
        parts = {
            tensor: reader.tensors[tensor]
            for tensor in reader.tensors
            if tensor.startswith(f"{name}.weight_")
        }
        low_rank = entry["format"] == "lowrank"
        needed = [f"{name}.weight_{part}" for part in (("u", "v") if low_rank else ("values",))]
        if not all(tensor in parts for tensor in needed):
            raise CheckpointError(
                f"{reader.folder}: config.json names the packed linear {name!r}, but its tensors "
                f"are not there"
            )
        first, last = parts[needed[0]], parts[needed[-1]]
        for tensor in needed:
            if len(parts[tensor].shape) != 2:
                raise CheckpointError(
                    f"{reader.folder}: {tensor} has shape {list(parts[tensor].shape)}, a matrix is "
                    f"expected"
                )
        shape = [first.shape[0], last.shape[1] * (1 if low_rank else 2)]
        form = f"lowrank {last.shape[0]}" if low_rank else entry["format"]
        zeros = None if low_rank else sparsity.get(name)
        linears.append(
            _row(
                name,
                shape,
                form,
                zeros,
                sum(part.nbytes for part in parts.values()),
                ITEM_BITS[first.dtype],
            )
        )
    for tensor, entry in reader.tensors.items():
        name = tensor.removesuffix(".weight")
        if tensor.endswith(".weight") and len(entry.shape) == 2 and name not in modules:
            linears.append(
                _row(
                    name,
                    list(entry.shape),
                    "dense",
                    sparsity.get(name),
                    entry.nbytes,
                    ITEM_BITS[entry.dtype],
                )
            )
    shards = [
        {"name": shard, "bytes": (reader.folder / shard).stat().st_size} for shard in reader.shards
    ]
    dense = reader.nbytes + sum(row["dense_bytes"] - row["bytes"] for row in linears)
    return {
        "folder": str(reader.folder),
        "architecture": _architecture(reader.config),
        "shards": shards,
        "tensors": len(reader.tensors),
        "bytes": reader.nbytes,
        "dense_bytes": dense,
        "ratio": reader.nbytes / dense if dense else 1.0,
        "linears": linears,
        "notes": reader.notes,
    }


def _architecture(config: dict[str, Any]) -> str | None:
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else config.get("model_type")
    return found if isinstance(found, str) and found.isprintable() else None


def _row(
    name: str, shape: list[int], form: str, sparsity: float | None, stored: int, bits: int
) -> dict[str, Any]:
    dense = math.prod(shape) * bits // 8
    return {
        "name": name,
        "shape": shape,
        "format": form,
        "sparsity": sparsity,
        "bytes": stored,
        "dense_bytes": dense,
        "ratio": stored / dense if dense else 1.0,
    }


def _show(found: dict[str, Any]) -> None:
    count = len(found["shards"])
    out.print(
        f"{found['architecture'] or 'no architecture named'}, {found['tensors']} tensors in "
        f"{count} shard{'s' * (count > 1)}"
    )
    for shard in found["shards"]:
        out.print(f"  {shard['name']}  {size(shard['bytes'])}")
    tell(found["notes"])
    rows = table("", "matrix >shape format >zeros >bytes >of-dense")
    for row in found["linears"]:
        sparsity = "-" if row["sparsity"] is None else f"{row['sparsity']:.1%}"
        rows.add_row(
            row["name"],
            "×".join(map(str, row["shape"])),
            row["format"],
            sparsity,
            size(row["bytes"]),
            f"{row['ratio']:.4f}",
        )
    out.print(rows)
    out.print(
        f"{size(found['bytes'])}, {found['ratio']:.4f} of its dense size "
        f"{size(found['dense_bytes'])}"
    )

"""`compress inspect`: everything the headers say, without torch."""

from __future__ import annotations

import json
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
    from compressor.checkpoint.dequantised import open_model
    from compressor.checkpoint.download import resolve
    from compressor.tools.describe import describe

    found = describe(open_model(resolve(model)))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)


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

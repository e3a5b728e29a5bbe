"""What was measured, as a table, CSV, JSON and a plot; and in words where nothing was gained."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from compressor.checkpoint.atomic import naming
from compressor.formats import PACKED

COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#7b4ea3", "#b8860b", "#2a9d8f", "#555555", "#d1495b")


def write(folder: Path, result: dict[str, Any]) -> None:
    """`bench.json` with everything, `kernels.csv`, `decode.csv` and `ratio.svg` as far as they were
    measured.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for name in ("kernels", "decode"):
            if result.get(name):
                _csv(folder / f"{name}.csv", result[name])
        if result.get("kernels"):
            ran_on = result["environment"]
            title = f"{ran_on.get('gpu') or ran_on['cpu']}, {result['kernels'][0]['dtype']}"
            drawing = plot(
                [row for row in result["kernels"] if row["dtype"] == result["kernels"][0]["dtype"]],
                title,
            )
            (folder / "ratio.svg").write_text(drawing, encoding="utf-8")


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def verdicts(result: dict[str, Any]) -> list[str]:
    """One sentence for each op and shape, and for each batch size of the models: the gain, or that
    there is none.
    """
    said = []
    ours = [row for row in result.get("kernels", []) if row["op"] in PACKED and "ratio" in row]
    dtypes = {row["dtype"] for row in ours}
    for key in dict.fromkeys(map(_linear, ours)):
        rows = [row for row in ours if _linear(row) == key]
        op, n, k, dtype = key
        name = f"{op} {n} x {k}" + (f" in {dtype}" if len(dtypes) > 1 else "")
        best = max(rows, key=lambda row: row["ratio"])
        if best["ratio"] <= 1:
            said.append(f"{name}: no gain here")
        else:
            none = [str(row["rows"]) for row in rows if row["ratio"] <= 1]
            said.append(
                f"{name}: up to {best['ratio']:.2f}x dense (at {best['rows']} rows)"
                + (f"; no gain here at {', '.join(none)} rows" if none else "")
            )
    decode = result.get("decode", [])
    dense = {row["batch"]: row for row in decode if row["model"] == "dense"}
    for row in decode:
        if row["model"] != "dense" and row["batch"] in dense:
            base = dense[row["batch"]]
            ratio, memory = (
                row["tokens_per_s"] / base["tokens_per_s"],
                row["peak_gb"] / base["peak_gb"],
            )
            gain = f"{ratio:.2f}x dense" if ratio > 1 else f"no gain here ({ratio:.2f}x dense)"
            said.append(
                f"decoding {row['model']} at batch {row['batch']}: {gain}, {memory:.2f}x its peak "
                f"memory"
            )
    return said


def _linear(row: dict[str, Any]) -> tuple[str, int, int, str]:
    return row["op"], row["out"], row["in"], row["dtype"]


def plot(rows: list[dict[str, Any]], title: str) -> str:
    """Speed relative to torch's dense product over rows of x, one panel for each op, one line for
    each shape; an SVG.
    """
    ours = [row for row in rows if "ratio" in row and row["op"] != "dense"]
    ops = list(dict.fromkeys(row["op"] for row in ours))
    counts = sorted({row["rows"] for row in ours})
    shapes = list(dict.fromkeys((row["out"], row["in"]) for row in ours))
    top = max([2.0, *(row["ratio"] for row in ours)])
    width, height = 300, 220
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{80 + len(ops) * (width + 40) + 130}" '
        f'height="{height + 110}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="60" y="22" font-size="14">Speed relative to a dense product, {title}</text>',
    ]
    for panel, op in enumerate(ops):
        left = 60 + panel * (width + 40)
        parts.append(_axes(op, left, width, height, counts, top))
        for place, shape in enumerate(shapes):
            points = [
                (
                    left + width * counts.index(row["rows"]) / max(1, len(counts) - 1),
                    60 + height * (1 - row["ratio"] / top),
                )
                for row in ours
                if row["op"] == op and (row["out"], row["in"]) == shape
            ]
            colour = COLOURS[place % len(COLOURS)]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points
            ]
    for place, (n, k) in enumerate(shapes):
        x, y = 60 + len(ops) * (width + 40), 70 + 18 * place
        parts.append(
            f'<rect x="{x}" y="{y - 9}" width="12" height="10" '
            f'fill="{COLOURS[place % len(COLOURS)]}"/>'
        )
        parts.append(f'<text x="{x + 18}" y="{y}">{n} × {k}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(op: str, left: int, width: int, height: int, counts: list[int], top: float) -> str:
    parts = [f'<text x="{left}" y="50">{op}</text>']
    for tick in range(int(2 * top) + 1):
        y = 60 + height * (1 - tick / 2 / top)
        stroke = "#333" if tick == 2 else "#ddd"  # dense itself
        parts.append(
            f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="{stroke}"/>'
        )
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick / 2:.1f}</text>'
        )
    for place, count in enumerate(counts):
        x = left + width * place / max(1, len(counts) - 1)
        parts.append(
            f'<text x="{x:.1f}" y="{60 + height + 18}" text-anchor="middle">{count}</text>'
        )
    parts.append(
        f'<text x="{left + width / 2}" y="{60 + height + 38}" text-anchor="middle">rows of x</text>'
    )
    return "\n".join(parts)

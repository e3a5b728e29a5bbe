"""Charts as SVG trees: columns over the blocks, a map of blocks x linears, stacked bars of bytes.

Every chart is 340 pixels wide, so that it fits a telephone and three fit side by side. Colours are
names of classes; the page gives them a value for light and for dark, `picture` for PNG files. Text
goes into the tree as text and is escaped by whoever writes the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

WIDTH = 340
STEPS = 9  # of the colour scale
_LEFT, _RIGHT = 48, 8


@dataclass(frozen=True)
class Chart:
    """A drawing, its title, and in `text` what it shows, for those who do not see it."""

    name: str
    title: str
    text: str
    svg: Element


def columns(
    name: str, title: str, unit: str, values: Mapping[int, float], show: Callable[[float], str]
) -> Chart:
    """One column for each block, `values` by its index, zero at the foot."""
    low, high = min(values, key=lambda key: values[key]), max(values, key=lambda key: values[key])
    text = (
        f"{title}, {unit}: from {show(values[low])} in block {low} to {show(values[high])} in "
        f"block {high}."
    )
    height, top, foot = 220, 26, 186
    svg = canvas(height, text)
    write(svg, 0, 12, unit, "label")
    ticks = _ticks(max(values.values()))
    scale = (foot - top) / ticks[-1]
    for tick in ticks:
        y = foot - tick * scale
        line(svg, _LEFT, y, WIDTH - _RIGHT, y, "axis" if tick == 0 else "grid")
        write(svg, _LEFT - 6, y + 4, f"{tick:g}", "label", anchor="end")
    step = (WIDTH - _LEFT - _RIGHT) / len(values)
    thin = _every(len(values), step, 24)
    for place, (index, value) in enumerate(sorted(values.items())):
        x, bar = _LEFT + place * step, max(1.0, min(step * 0.8, 48))
        rect(
            svg,
            x + (step - bar) / 2,
            foot - value * scale,
            bar,
            value * scale,
            "bar",
            f"block {index}: {show(value)}",
        )
        if place % thin == 0:
            write(svg, x + step / 2, foot + 16, str(index), "label", anchor="middle")
    write(svg, (WIDTH + _LEFT) / 2, height - 4, "block", "label", anchor="middle")
    return Chart(name, title, text, svg)


def heat_map(
    name: str,
    title: str,
    blocks: Sequence[int],
    cells: Mapping[tuple[int, str], float],
    show: Callable[[float], str],
    missing: str,
) -> Chart:
    """Rows are `blocks`, columns linears, `cells` by both; `missing` says what a cell without a
    value is.
    """
    parts = _in_order(cells)
    low, high = min(cells.values()), max(cells.values())
    logarithmic = low > 0 and high / low > 20
    (worst, where), (best, there) = (pick(cells, key=lambda key: cells[key]) for pick in (max, min))
    text = (
        f"{title}: from {show(low)} ({there} of block {best}) to {show(high)} ({where} of block "
        f"{worst})."
    )
    row, head = max(8.0, min(28.0, 560 / len(blocks))), 76
    foot = head + row * len(blocks)
    gaps = len(cells) < len(blocks) * len(parts)
    svg = canvas(foot + (64 if gaps else 46), text)
    left, width = 34, (WIDTH - 34 - 40) / len(parts)
    for place, label in enumerate(short(parts)):
        write(svg, left + (place + 0.5) * width, head - 8, label, "label", turn=-40)
    thin = _every(len(blocks), row, 13)
    for place_of_block, block in enumerate(blocks):
        y = head + place_of_block * row
        if place_of_block % thin == 0:
            write(svg, left - 6, y + row / 2 + 4, str(block), "label", anchor="end")
        for place, part in enumerate(parts):
            value = cells.get((block, part))
            kind = "none" if value is None else f"r{_step(value, low, high, logarithmic)}"
            said = f"{part} of block {block}: {missing if value is None else show(value)}"
            gap = min(1.0, row / 10)
            rect(svg, left + place * width, y, max(width - gap, 0.5), row - gap, kind, said)
            if value is not None and row >= 18 and width >= 34:
                write(
                    svg,
                    left + (place + 0.5) * width,
                    y + row / 2 + 4,
                    f"{value:.2g}",
                    f"t{kind[1:]}",
                    anchor="middle",
                )
    _legend(svg, left, foot + 14, show(low), show(high), logarithmic)
    if gaps:
        rect(svg, left, foot + 48, 18, 10, "none")
        write(svg, left + 26, foot + 57, missing, "label")
    return Chart(name, title, text, svg)


def stacked(
    name: str,
    title: str,
    bars: Mapping[str, Sequence[float]],
    parts: Sequence[str],
    show: Callable[[float], str],
) -> Chart:
    """One horizontal bar for each entry of `bars`, made of as many pieces as `parts` has names."""
    text = f"{title}: " + "; ".join(
        f"{label} {show(sum(pieces))} "
        f"({', '.join(f'{part} {show(piece)}' for part, piece in zip(parts, pieces, strict=True))})"
        for label, pieces in bars.items()
    )
    svg = canvas(52 * len(bars) + 24 * len(parts) + 4, f"{text}.")
    scale = (WIDTH - 2) / max(1.0, *(sum(pieces) for pieces in bars.values()))
    for number_of_bar, (label, pieces) in enumerate(bars.items()):
        y, x = 52.0 * number_of_bar, 1.0
        write(svg, 0, y + 14, label, "label")
        write(svg, WIDTH, y + 14, show(sum(pieces)), "label", anchor="end")
        for number, piece in enumerate(pieces):
            rect(
                svg,
                x,
                y + 20,
                piece * scale,
                20,
                f"s{number}",
                f"{label}, {parts[number]}: {show(piece)}",
            )
            x += piece * scale
    for number, part in enumerate(parts):
        y = 52 * len(bars) + 24 * number + 4
        rect(svg, 1, y, 12, 12, f"s{number}")
        write(svg, 20, y + 11, part, "label")
    return Chart(name, title, f"{text}.", svg)


def canvas(height: float, text: str) -> Element:
    """An empty drawing that says `text` to those who do not see it."""
    size = {"width": str(WIDTH), "height": f"{height:.0f}", "viewBox": f"0 0 {WIDTH} {height:.0f}"}
    return Element("svg", {**size, "role": "img", "aria-label": text})


def rect(
    svg: Element, x: float, y: float, width: float, height: float, kind: str, said: str = ""
) -> None:
    """A rectangle of a class of colour, and what is shown when one points at it."""
    place = {"x": f"{x:.2f}", "y": f"{y:.2f}", "width": f"{width:.2f}", "height": f"{height:.2f}"}
    drawn = SubElement(svg, "rect", {**place, "class": kind})
    if said:
        SubElement(drawn, "title").text = said


def line(svg: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    """A straight line."""
    ends = {"x1": f"{x1:.2f}", "y1": f"{y1:.2f}", "x2": f"{x2:.2f}", "y2": f"{y2:.2f}"}
    SubElement(svg, "line", {**ends, "class": kind})


def curve(svg: Element, points: Sequence[tuple[float, float]], kind: str, width: float) -> None:
    """An open line through points, `width` pixels wide."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    SubElement(svg, "polyline", {"points": places, "class": kind, "stroke-width": f"{width:g}"})


def write(
    svg: Element,
    x: float,
    y: float,
    text: str,
    kind: str,
    *,
    anchor: str = "start",
    turn: float = 0,
) -> None:
    """Text with its foot at `y`, turned by degrees."""
    place = {"x": f"{x:.2f}", "y": f"{y:.2f}", "class": kind, "text-anchor": anchor}
    if turn:
        place["transform"] = f"rotate({turn:g} {x:.2f} {y:.2f})"
    SubElement(svg, "text", place).text = text


def _legend(svg: Element, x: float, y: float, low: str, high: str, logarithmic: bool) -> None:
    for step in range(STEPS):
        rect(svg, x + 18.0 * step, y, 18, 10, f"r{step}")
    write(svg, x, y + 26, low, "label")
    write(svg, x + 18 * STEPS, y + 26, high, "label", anchor="end")
    if logarithmic:
        write(svg, x + 18 * STEPS + 12, y + 10, "logarithmic", "label")


def _step(value: float, low: float, high: float, logarithmic: bool) -> int:
    if high <= low:
        return 0
    if logarithmic:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value - low) / (high - low)
    return min(STEPS - 1, int(share * STEPS))


def _ticks(most: float) -> list[float]:
    """Zero and three to six round numbers, the last not below `most`."""
    if most <= 0:
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(most))
    step = next(unit * part for part in (0.2, 0.25, 0.5, 1, 2, 2.5) if most / (unit * part) <= 5)
    return [step * count for count in range(math.ceil(most / step - 1e-9) + 1)]


def _every(count: int, step: float, room: float) -> int:
    """Label every so many of `count` marks that are `step` apart, each label taking `room`; a round
    number.
    """
    return next(
        (thin for thin in (1, 2, 5, 10, 20, 50, 100, 200, 500) if thin * step >= room), count
    )


def _in_order(cells: Iterable[tuple[int, str]]) -> list[str]:
    """The linears of all blocks, each behind the one it follows in its own block: the first block
    need not have them all.
    """
    found: list[str] = []
    last: tuple[int, str] | None = None
    for block, part in cells:
        if part not in found:
            found.insert(found.index(last[1]) + 1 if last and last[0] == block else 0, part)
        last = block, part
    return found


def short(names: Sequence[str]) -> list[str]:
    """The last part of each dotted name, or as many as tell them apart; never longer than fits."""
    lasts = [[".".join(name.split(".")[-kept:]) for name in names] for kept in range(1, 4)]
    found = next((last for last in lasts if len(set(last)) == len(last)), lasts[-1])
    return [name if len(name) <= 16 else f"…{name[-15:]}" for name in found]

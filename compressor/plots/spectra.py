"""The spectra that ranks were chosen from, as small panels: one for each kind of linear, a line for
each block, coloured by depth.

All panels have the same two axes, so that they can be compared: the place in the spectrum as a part
of the full rank, and the singular value, logarithmic. A square marks the rank that was kept, a
vertical line the rank from which on factors are no smaller than the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from compressor.plots.charts import WIDTH, Chart, canvas, curve, line, rect, short, write
from compressor.records.read_report import Spectrum

DEPTHS = 6  # colours of the lines
_DECADES, _MOST_DECADES = 4, 9  # shown, counted from the largest value
_LABELS = 5  # decades, from which on every other one is labelled
_MANY = 16  # blocks, from which on lines and marks are small
_ACROSS, _LEFT, _BETWEEN = 2, 34, 10
_BROAD = (WIDTH - _LEFT - 4 - _BETWEEN * (_ACROSS - 1)) / _ACROSS
_TOP, _HIGH, _HEAD, _FOOT = 18, 96, 24, 12


def spectra(name: str, title: str, found: Sequence[Spectrum]) -> Chart | None:
    """The chart; None where every value is zero."""
    values = [value for one in found for _, value in one.points if value > 0]
    if not values:
        return None
    parts = list(dict.fromkeys(one.part for one in found))
    blocks = sorted({one.block for one in found})
    low, high = _range(found, values)
    foot = _TOP + math.ceil(len(parts) / _ACROSS) * (_HIGH + _HEAD + _FOOT)
    svg = canvas(foot + 96, _said(title, found))
    write(svg, 0, 12, "singular value, as the method weighs it", "label")
    for number, (part, label) in enumerate(zip(parts, short(parts), strict=True)):
        row, column = divmod(number, _ACROSS)
        x, y = _LEFT + column * (_BROAD + _BETWEEN), _TOP + row * (_HIGH + _HEAD + _FOOT) + _HEAD
        write(svg, x, y - 8, label, "ink")
        _panel(
            svg,
            _Axes(x, y, low, high),
            [one for one in found if one.part == part],
            blocks,
            labelled=column == 0,
        )
        if number >= len(parts) - _ACROSS:
            write(svg, x, y + _HIGH + 13, "0", "label")
            write(svg, x + _BROAD, y + _HIGH + 13, "full rank", "label", anchor="end")
    _legend(svg, foot + 20, blocks)
    return Chart(name, title, _said(title, found), svg)


def _range(found: Sequence[Spectrum], values: Sequence[float]) -> tuple[float, float]:
    """Logarithms of the least and the largest value that are shown: a few decades, and more where
    kept ranks lie deeper.
    """
    high = math.log10(max(values)) + 0.1
    kept = [
        value for one in found if one.rank is not None and (value := _value(one, one.rank - 1)) > 0
    ]
    deepest = min(high - _DECADES, math.log10(min(kept, default=max(values))) - 0.5)
    return min(max(math.log10(min(values)), deepest, high - _MOST_DECADES), high - 1), high


def _said(title: str, found: Sequence[Spectrum]) -> str:
    ranks = [one for one in found if one.rank is not None]
    kept = ""
    if ranks:
        least, most = (
            pick(ranks, key=lambda one: (one.rank or 0) / one.full) for pick in (min, max)
        )
        kept = ", kept ranks from " + " to ".join(
            f"{one.rank:g} of {one.full} ({one.part} of block {one.block})" for one in (least, most)
        )
    return f"{title}: {len(found)} spectra{kept}; {len(found) - len(ranks)} left dense."


@dataclass(frozen=True)
class _Axes:
    """Where a panel is, and the logarithms of the values at its foot and at its top."""

    x: float
    y: float
    low: float
    high: float

    def across(self, one: Spectrum, count: float) -> float:
        """How far the first `count` values reach."""
        return self.x + _BROAD * min(1.0, count / one.full)

    def height(self, value: float) -> float:
        """Of a value; what is below the foot is put there."""
        share = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return self.y + _HIGH * (1 - min(1.0, max(0.0, share)))


def _panel(
    svg: Element, axes: _Axes, own: Sequence[Spectrum], blocks: Sequence[int], *, labelled: bool
) -> None:
    foot = axes.y + _HIGH
    decades = range(math.ceil(axes.low), math.floor(axes.high) + 1)
    for decade in decades:
        height = axes.height(10.0**decade)
        line(svg, axes.x, height, axes.x + _BROAD, height, "grid")
        if labelled and (len(decades) <= _LABELS or decade % 2 == 0):
            write(svg, axes.x - 5, height + 4, _power(decade), "label", anchor="end")
    line(svg, axes.x, foot, axes.x + _BROAD, foot, "axis")
    for limit in sorted({axes.across(one, one.largest_rank) for one in own}):
        line(svg, limit, axes.y, limit, foot, "axis")
    many = len(blocks) > _MANY
    for one in own:
        points = [(axes.across(one, place + 1), axes.height(value)) for place, value in one.points]
        seen = next(
            (count for count, (_, height) in enumerate(points, 1) if height >= foot), len(points)
        )
        curve(svg, points[:seen], _depth(blocks, one.block), 0.5 if many else 1.25)
    for one in own:
        if one.rank is not None:
            _mark(
                svg,
                axes.across(one, one.rank),
                axes.height(_value(one, one.rank - 1)),
                2.0 if many else 4.0,
                one,
            )


def _mark(svg: Element, x: float, y: float, side: float, one: Spectrum) -> None:
    said = (
        f"{one.part} of block {one.block}: rank {one.rank:g} of {one.full}, factors are smaller up "
        f"to {one.largest_rank}"
    )
    rim = side / 4
    rect(svg, x - side / 2 - rim, y - side / 2 - rim, side + 2 * rim, side + 2 * rim, "halo")
    rect(svg, x - side / 2, y - side / 2, side, side, "ink", said)


def _power(decade: int) -> str:
    return f"{10.0**decade:g}" if -2 <= decade <= 3 else f"1e{decade}"


def _value(one: Spectrum, place: float) -> float:
    """The singular value at `place`, between two known ones on a line in logarithms."""
    before = max((point for point in one.points if point[0] <= place), default=one.points[0])
    after = min((point for point in one.points if point[0] >= place), default=one.points[-1])
    if before[0] >= after[0] or not before[1] or not after[1]:
        return before[1]
    share = (place - before[0]) / (after[0] - before[0])
    return before[1] ** (1 - share) * after[1] ** share


def _depth(blocks: Sequence[int], block: int) -> str:
    return f"d{round(blocks.index(block) / max(1, len(blocks) - 1) * (DEPTHS - 1))}"


def _legend(svg: Element, y: float, blocks: Sequence[int]) -> None:
    for depth in range(DEPTHS if len(blocks) > 1 else 1):
        rect(svg, _LEFT + 18.0 * depth, y, 18, 4, f"d{depth}")
    write(svg, _LEFT, y + 20, f"block {blocks[0]}", "label")
    if len(blocks) > 1:
        write(svg, _LEFT + 18 * DEPTHS, y + 20, f"block {blocks[-1]}", "label", anchor="end")
    rect(svg, _LEFT, y + 33, 4, 4, "ink")
    write(svg, _LEFT + 14, y + 39, "rank that was kept; a line without it stays dense", "label")
    line(svg, _LEFT + 2, y + 48, _LEFT + 2, y + 60, "axis")
    write(svg, _LEFT + 14, y + 58, "from here on factors are no smaller", "label")

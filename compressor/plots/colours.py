"""The colours of the page and its charts, by name, once for light and once for dark.

`d0` … `d5` are lines by depth, first blocks to last, `halo` what sets a mark upon them off.
`r0` … `r8` is the scale of the heat maps, a single hue that goes away from the page, `t0` … `t8`
the text upon it; `s0`, `s1`,
`s2` are the pieces of a stacked bar.
"""

from __future__ import annotations

_LIGHT_SCALE = [
    "#e3edf8",
    "#cbdff1",
    "#aacfe6",
    "#82badb",
    "#5ba3cf",
    "#2b77b0",
    "#1d68a8",
    "#0e559f",
    "#08407f",
]
_DARK_SCALE = [
    "#17293b",
    "#1b3a56",
    "#1f4b71",
    "#255e8e",
    "#2d6a9c",
    "#4a8cbf",
    "#6ba6d2",
    "#94c1e2",
    "#c3dff2",
]

_LIGHT_DEPTHS = ["#c06a00", "#c4453a", "#b02c78", "#7d3fa8", "#4653b8", "#123a8c"]
_DARK_DEPTHS = ["#ffd166", "#ff9f6b", "#f2789f", "#cf82dd", "#9a93f2", "#5f8df5"]


def _depths(colours: list[str]) -> dict[str, str]:
    return {f"d{depth}": colour for depth, colour in enumerate(colours)}


def _scale(colours: list[str], first: str, last: str, turn: int) -> dict[str, str]:
    marks = {f"r{step}": colour for step, colour in enumerate(colours)}
    return marks | {f"t{step}": first if step < turn else last for step in range(len(colours))}


LIGHT = {
    "page": "#ffffff", "card": "#f6f7f9", "ink": "#1b2026", "label": "#545d68", "edge": "#d5dae0",
    "grid": "#e2e6ea",
    "axis": "#8b949e", "bar": "#2070b4", "none": "#f0e4cf", "link": "#0b5cad", "s0": "#2070b4",
    "s1": "#e0a43a", "s2": "#9aa4ae",
    "halo": "#ffffff", **_depths(_LIGHT_DEPTHS),
    **_scale(_LIGHT_SCALE, "#1b2026", "#ffffff", 5),
}  # fmt: skip
DARK = {
    "page": "#11161c", "card": "#1a2027", "ink": "#e8ecf0", "label": "#a3adb8", "edge": "#343d47",
    "grid": "#2a323b",
    "axis": "#6e7781", "bar": "#5ba3cf", "none": "#4a3d24", "link": "#7ab8ee", "s0": "#4a8cbf",
    "s1": "#d69a2d", "s2": "#69737d",
    "halo": "#11161c", **_depths(_DARK_DEPTHS),
    **_scale(_DARK_SCALE, "#e8ecf0", "#0b0f14", 5),
}  # fmt: skip

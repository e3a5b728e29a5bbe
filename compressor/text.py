"""Numbers and names as people read them, and paths as they write them."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from compressor.errors import UsageError

_IN_BLOCK = re.compile(r".*?\.(\d{1,6})\.(.+)")


def place(name: str) -> tuple[int | None, str]:
    """The block of a linear and its name inside, numbers of experts as `*`; None and the name for
    one outside the blocks.
    """
    inside = _IN_BLOCK.fullmatch(name)
    return (int(inside[1]), part(inside[2])) if inside else (None, name)


def part(inside: str) -> str:
    """The name of a linear inside its block with the numbers of experts as `*`:
    `mlp.experts.*.up_proj`.
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", inside)


def to_ignore(*names: str) -> str:
    """What to write to leave linears of these names dense, in all blocks and of all experts:
    `` `ignore='model.layers.*.mlp.experts.*.up_proj'` ``.
    """
    globs = dict.fromkeys(part(name) for name in names)
    return " and ".join(f"`ignore={glob!r}`" for glob in globs)


def size(count: float) -> str:
    """Bytes: `1.94 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def number(value: float) -> str:
    """Four significant digits, never an exponent where it can be helped: `0.0213`, `1,234`."""
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def home_path(path: str | PathLike[str]) -> Path:
    """`path` with a leading `~` or `~user` as that home folder, as a shell gives it.

    A shell leaves it to us in quotes and after `--option=`.

    Raises:
        UsageError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        raise UsageError(
            f"{path} begins with {name}, but there is no such user; ./{path} is a file of that name"
        ) from None

"""SHA256SUMS: the sha256 of every other file of a finished folder, as `sha256sum` writes and checks
it.

It lies inside the folder: it is a function of the files beside it, so the folder stays the same for
the same run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from compressor.checkpoint.atomic import sha256
from compressor.checkpoint.side_files import TEMPLATES, names

NAME = "SHA256SUMS"
_LOADED = {
    ".safetensors",
    ".json",
    ".py",
    ".bin",
    ".pt",
    ".pth",
    ".jinja",
    ".model",
}  # what a loader would read
_LINE = re.compile(rf"([0-9a-f]{{64}})  ((?:{TEMPLATES}/)?[^/\\\x00]+)")


def manifest(hashes: Mapping[str, str]) -> str:
    """The text of SHA256SUMS for `hashes`, file name -> hexadecimal sha256."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def problems(folder: Path) -> list[str]:
    """One line for each file that SHA256SUMS does not describe as it is: gone, changed, or added
    and read by loaders.
    """
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return [f"{NAME} is missing: nothing says what the files should hold"]
    except (OSError, ValueError) as error:
        return [f"{NAME} is not readable: {str(error)[:100]}"]
    found, listed = [], set()
    for number, line in enumerate(text.splitlines(), 1):
        entry = re.fullmatch(_LINE, line)
        if not entry or entry[2].rpartition("/")[2] in (".", ".."):
            found.append(f"{NAME} line {number} is no checksum and file name")
            continue
        listed.add(entry[2])
        found += _changed(folder, entry[2], entry[1])
    there = {name for name in names(folder) if Path(name).suffix in _LOADED}
    return found + [
        f"{name} is not in {NAME}: it was added later" for name in sorted(there - listed)
    ]


def _changed(folder: Path, name: str, digest: str) -> list[str]:
    path = folder / name
    if not path.is_file():
        return [f"{name} is missing"]
    try:
        return (
            []
            if sha256(path) == digest
            else [f"{name} has changed: its sha256 is not that in {NAME}"]
        )
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror}"]

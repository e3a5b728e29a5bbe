"""Files that a crash leaves either as they were or as they were to be: written under another name,
forced to disk, renamed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 22  # bytes read at once


def write_file(path: Path, data: bytes) -> None:
    """Make `path` hold `data`: a crash at any moment leaves the old file, or the new one, never a
    part of it.
    """
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside says which file it is about: the system does not, of a full disk. Raises
    OutputError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"output {path} could not be written: {reason}") from None


def write_output(path: Path, data: bytes) -> None:
    """As `write_file`, for a file that the user named. Raises OutputError; no part is left then."""
    with naming(path):
        try:
            write_file(path, data)
        except OSError:
            with suppress(OSError):
                path.with_name(f"{path.name}.new").unlink()
            raise


def sync(path: Path) -> None:
    """Force a file to disk, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path, start: int = 0, stop: int | None = None) -> str:
    """Of the bytes `[start, stop)` of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        while left > 0 and (data := file.read(min(left, _PIECE))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; of the tensor itself where it is contiguous and in host memory."""
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data

"""One safetensors file: its header, checked against the file before anything is believed. No torch
at import.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.side_files import lfs_pointer
from compressor.errors import CheckpointError, OutputError

ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
_COPY = 1 << 24  # bytes read at once of a tensor that is copied
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_MAX_NAME = 500  # characters of a tensor's name, which is printed


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: absolute byte range `[start, stop)` of `shard`."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and `__metadata__` of a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: truncated file, lying lengths, overlapping or missing bytes, unknown dtype,
            malformed header.
    """
    if pointer := lfs_pointer(path):
        raise CheckpointError(pointer)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path} is not a safetensors file: header length {length} in a file of {size} "
                    f"bytes"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a malformed safetensors header: {str(error)[:200]}"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a malformed safetensors header: expected a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(
            f"{path} has a malformed safetensors header: __metadata__ must map text to text"
        )
    entries = {name: _entry(path, name, info, 8 + length) for name, info in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {entry.start}, expected {position}"
            )
        position = entry.stop
    if position != size:
        raise CheckpointError(
            f"{path} is {'truncated' if size < position else 'too long'}: {size} bytes, its header "
            f"describes {position}"
        )
    return entries, metadata


def _entry(path: Path, name: str, info: Any, base: int) -> Entry:
    """One header entry, checked: printable name, known dtype, whole shape, byte range as long as
    the shape says.
    """
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise CheckpointError(
            f"{path}: a tensor is named {name[:100]!r}; names are up to {_MAX_NAME} printable "
            f"characters"
        )
    try:
        dtype, shape, (start, stop) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry") from None
    whole = all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, start, stop))
    if not isinstance(dtype, str) or dtype not in ITEM_BITS or not whole:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype!r} and shape {list(shape)}, which is not "
            f"understood"
        )
    needed = math.prod(shape) * ITEM_BITS[dtype] // 8
    if stop - start != needed:
        raise CheckpointError(
            f"{path}: tensor {name!r} ({dtype} {list(shape)}) needs {needed} bytes, its header "
            f"gives {stop - start}"
        )
    return Entry(path.name, dtype, shape, base + start, base + stop)


def byte_range(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes `[start, stop)` of a file, some at a time. Raises OutputError where it ends before:
    a file does not become shorter while a run uses it.
    """
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            data = file.read(min(stop - start, _COPY))
            if not data:
                raise OutputError(f"{path} became shorter while it was read")
            yield data
            start += len(data)

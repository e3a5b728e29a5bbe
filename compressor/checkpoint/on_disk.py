"""A tensor of a safetensors file, read by its place there: as much of it as is asked for.

A slice of the library's own needs the file opened by the library, which reads the whole header each
time: 5 ms for one of 4,656 tensors, which a mixture with as many linears pays for each of them. And
a file that stays open is mapped, and its pages count as memory of the process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.header import ITEM_BITS, Entry
from compressor.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""Names in a header -> torch's, of what is read here; others are left to the library."""


class OnDisk:
    """The tensor of `entry` in the file `path`: `[...]`, `[index]` and `[start:stop]` along the
    first dimension read that much, into memory of its own. Of a dtype in `DTYPES`.
    """

    def __init__(self, path: Path, entry: Entry) -> None:
        self._path, self._entry = path, entry

    def __getitem__(self, index: Any) -> Tensor:
        entry = self._entry
        if index is ...:
            return self._read(entry.start, entry.shape)
        rows, *row = entry.shape
        nbytes = math.prod(row) * ITEM_BITS[entry.dtype] // 8
        if isinstance(index, slice):
            start, stop, _ = index.indices(rows)
            return self._read(entry.start + start * nbytes, (max(0, stop - start), *row))
        return self._read(entry.start + index * nbytes, tuple(row))

    def _read(self, start: int, shape: tuple[int, ...]) -> Tensor:
        """Raises OutputError where the file ends before: a file does not become shorter while a run
        uses it.
        """
        import torch

        tensor = torch.empty(shape, dtype=getattr(torch, DTYPES[self._entry.dtype]))
        into = tensor.view(-1).view(torch.uint8).numpy().data
        with self._path.open("rb") as file:
            file.seek(start)
            if file.readinto(into) != tensor.nbytes:
                raise OutputError(f"{self._path} became shorter while it was read")
        return tensor

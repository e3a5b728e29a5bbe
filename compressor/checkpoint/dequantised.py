"""A checkpoint that was published quantised, read as the bfloat16 checkpoint that it stands for.

`Reader` sees the tensors that are stored. Here a name stands for a dense tensor, which is made from
its stored parts when it is read and not kept: whoever is given this reader knows of no
quantisation, in its tensors or in its config. `block_scales` and `mxfp4` say which tensors belong
together and what they mean. No torch at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint import block_scales, mxfp4
from compressor.checkpoint.header import ITEM_BITS, Entry
from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError
from compressor.text import size

if TYPE_CHECKING:
    from torch import Tensor

Weight = block_scales.BlockScaled | mxfp4.Mxfp4
DTYPE = "BF16"  # of every weight that was quantised
_KEY = "quantization_config"
_METHODS = ("fp8", "mxfp4")  # that can be undone, by their names in config.json


def open_model(folder: Path) -> Reader:
    """The checkpoint in `folder` as its dense tensors, whether they are stored so or quantised in a
    way that can be undone.

    Raises:
        CheckpointError: it does not hold together, or is quantised in another way.
    """
    reader = Reader(folder)
    described = described_quantisation(reader.config)
    if described.get("quant_method") in _METHODS:
        return DequantisedReader(folder)
    return reader


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of a quantised checkpoint as that of the bfloat16 one."""
    plain = {key: value for key, value in config.items() if key != _KEY}
    for key in ("dtype", "torch_dtype"):
        if key in plain:
            plain[key] = "bfloat16"
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = dense_config(text)
    return plain


class DequantisedReader(Reader):
    """A checkpoint folder whose `tensors` are the dense ones, in bfloat16 where they were
    quantised, laid out in each shard as the safetensors library would.

    Attributes:
        weights: what was quantised, by the name of the dense tensor.

    Raises:
        CheckpointError: at construction, for anything that does not hold together.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        described = described_quantisation(self.config)
        self.method = described["quant_method"]
        try:
            self.weights: Mapping[str, Weight]
            if self.method == "mxfp4":
                self.weights, left = mxfp4.find(self.stored), set()
            else:
                self.weights = found = block_scales.find(self.stored, described)
                left = block_scales.dropped(found, self.stored)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        self.tensors = _laid_out(self.stored, self.weights, left)
        self.config = dense_config(self.config)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the folder: a line each."""
        if not self.weights:
            told = f"config.json says that it is quantised ({self.method}), and no tensor of it is"
            return [*super().notes, told]
        forms = sorted({weight.form for weight in self.weights.values()})
        return [
            *super().notes,
            f"the model is quantised ({self.method}): {len(self.weights)} tensors are read as "
            f"bfloat16 ({', '.join(forms)}), {size(self.stored_nbytes)} on disk, "
            f"{size(self.nbytes)} dense",
        ]

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.nbytes for entry in self.stored.values())

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Any]]:
        """A function `name -> lazy slice`, valid inside the `with`; `[...]`, `[index]` and
        `[start:stop]` of a slice read that much.
        """
        with self.files() as stored:

            def lazy_stored(name: str) -> Any:
                return stored(self.stored[name].shard, name)

            def lazy(name: str) -> Any:
                weight = self.weights.get(name)
                return _Slice(weight, lazy_stored) if weight else lazy_stored(name)

            yield lazy

    def read(self, name: str, at: int | None = None) -> Any:
        """One tensor, or only `tensor[at]`, as a copy of its own in memory."""
        if name not in self.weights:
            return super().read(name, at)
        return _Slice(self.weights[name], self.on_disk)[... if at is None else at]

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a dense tensor, some at a time."""
        if name not in self.weights:
            yield from self.stored_bytes(self.stored[name])
            return
        from compressor.checkpoint.atomic import tensor_bytes

        shape = self.tensors[name].shape
        step = max(1, _AT_ONCE // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            with self.opened() as lazy:  # anew: pages of a file that stays mapped count as memory
                yield tensor_bytes(lazy(name)[start : start + step])

    def check_scales(self) -> None:
        """Read every scale, and no weight. Raises CheckpointError for one that is no number."""
        for weight in self.weights.values():
            with self.files() as stored:
                weight.check(lambda name, stored=stored: stored(self.stored[name].shard, name))


_AT_ONCE = 1 << 24  # numbers of a tensor that is copied


class _Slice:
    """A dense tensor that is made when it is read, as far as it is: what safetensors' slices do."""

    def __init__(self, weight: Weight, lazy: Callable[[str], Any]) -> None:
        self._weight, self._lazy = weight, lazy

    def __getitem__(self, index: Any) -> Tensor:
        rows = self._weight.shape[0]
        if index is ...:
            return self._weight.rows(self._lazy, 0, rows)
        if isinstance(index, slice):
            start, stop, _ = index.indices(rows)
            return self._weight.rows(self._lazy, start, stop)
        return self._weight.rows(self._lazy, index, index + 1)[0]

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return DTYPE

    def get_shape(self) -> list[int]:
        """Of the dense tensor."""
        return list(self._weight.shape)


def described_quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config` of a model, or of its language model; empty where there is none."""
    text = config.get("text_config")
    inner = text.get(_KEY) if isinstance(text, Mapping) else None
    described = config.get(_KEY) or inner
    return described if isinstance(described, Mapping) else {}


def _laid_out(
    stored: Mapping[str, Entry], weights: Mapping[str, Weight], dropped: set[str]
) -> dict[str, Entry]:
    """The headers of the dense tensors: in each shard wide ones first, then by name."""
    parts = {part for weight in weights.values() for part in weight.parts}
    dense = {n: entry for n, entry in stored.items() if n not in parts and n not in dropped}
    for name, weight in weights.items():
        dense[name] = Entry(stored[weight.parts[0]].shard, DTYPE, weight.shape, 0, 0)
    ends: dict[str, int] = {}
    placed: dict[str, Entry] = {}

    def place(item: tuple[str, Entry]) -> tuple[str, int, str]:
        return item[1].shard, -ITEM_BITS[item[1].dtype], item[0]

    for name, entry in sorted(dense.items(), key=place):
        start = ends.get(entry.shard, 0)
        ends[entry.shard] = start + math.prod(entry.shape) * ITEM_BITS[entry.dtype] // 8
        placed[name] = replace(entry, start=start, stop=ends[entry.shard])
    return placed

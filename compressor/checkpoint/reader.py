"""A checkpoint folder on disk: headers and index, validated before anything is believed. No torch
at import.

Reading never unpickles and never leaves the folder. Tensors are read one at a time; nothing here
holds a whole shard.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.side_files import (
    PATTERNS,
    TEMPLATES,
    left_files,
    lfs_pointer,
    side_files,
)
from compressor.errors import CheckpointError, OutputError
from compressor.text import home_path

ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
_COPY = 1 << 24  # bytes read at once of a tensor that is copied
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_SIZE = re.compile(
    "size|dim|head|layer|expert|rank|width|channel|embd|inner|d_model|group"
)  # in keys of config.json
_LENGTH = re.compile(
    "chunk|window|image|patch|audio|theta"
)  # in keys that measure the input, or the angle of a rotation, not the model
_MOST_POSITIONS = 1 << 24  # that any model was made for; some families keep a table of them
_MAX_NAME = 500  # characters of a tensor's name, which is printed
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is missing, unreadable or no
    object.
    """
    if pointer := lfs_pointer(path):
        raise CheckpointError(pointer)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


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


class Reader:
    """A checkpoint folder: `config`, `shards` (file names, in order), `tensors` (name -> Entry) and
    `metadata` per shard.

    Raises:
        CheckpointError: at construction, for anything that does not hold together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        if not (folder / "config.json").is_file():
            missing = "a Hugging Face checkpoint folder is expected"
            raise CheckpointError(
                f"{folder} has no config.json: {_only_adapter(folder) or missing}"
            )
        self.config = read_json(folder / "config.json")
        for name in side_files(folder, code=False):
            if pointer := lfs_pointer(folder / name):
                raise CheckpointError(pointer)
        self.index = self._index()
        self.shards = self._shard_names()
        self.tensors: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for shard in self.shards:
            entries, self.metadata[shard] = read_header(folder / shard)
            if twice := self.tensors.keys() & entries.keys():
                raise CheckpointError(
                    f"{folder}: tensor {min(twice)!r} is in more than one shard, {shard} among them"
                )
            self.tensors.update(entries)
        self._check_index()

    def _index(self) -> dict[str, Any] | None:
        """The index, if it is what transformers would load: only where there is no single file."""
        named = self.config.get("transformers_weights")
        if isinstance(named, str) and re.search(r"\.safetensors(\.index\.json)?$", named):
            raise CheckpointError(
                f"{self.folder}/config.json names its weights by transformers_weights "
                f"({named[:100]!r}): rename them to {SINGLE}, or to {INDEX} with its shards, and "
                "remove that key"
            )
        single = (self.folder / SINGLE).is_file()
        return None if single or not (path := self.folder / INDEX).is_file() else read_json(path)

    @property
    def notes(self) -> list[str]:
        """What of the folder could be taken for its weights, and is not: a line each."""
        found = []
        others = [*self.folder.glob("model-*-of-*.safetensors"), self.folder / INDEX]
        if self.index is None and (there := [path.name for path in others if path.is_file()]):
            found.append(
                f"the model's folder has two sets of weights: {SINGLE} is used, as transformers "
                f"does, {there[-1]} and what belongs to it is not"
            )
        adapters = [*self.folder.glob("adapter_model*.safetensors")]
        if adapters and (self.folder / "adapter_config.json").is_file():
            found.append(
                f"the model's folder has an adapter beside the weights: {adapters[0].name} is not "
                "applied; merge it first if the weights should have it"
            )
        return found

    def left(self, *, code: bool) -> list[str]:
        """What of the folder does not go along into one that is made of it: a line, or none.

        Args:
            code: whether its Python files do.
        """
        used = [*self.shards, *([INDEX] if self.index is not None else [])]  # it is made anew
        names = left_files(self.folder, used, code=code)
        if not names:
            return []
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return [f"not taken along from the model's folder, as not known to belong: {some}"]

    def _shard_names(self) -> list[str]:
        if self.index is None:
            if (self.folder / SINGLE).is_file():
                return [SINGLE]
            raise CheckpointError(_no_weights(self.folder))
        weight_map = _weight_map(self.folder)
        names = list(dict.fromkeys(weight_map.values()))
        for shard in names:
            if not (self.folder / shard).is_file():
                raise CheckpointError(
                    f"{self.folder / INDEX} names {shard}, which is not there: the download is "
                    f"incomplete"
                )
        return sorted(names)

    def _check_index(self) -> None:
        if self.index is None:
            return
        for name, shard in self.index["weight_map"].items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise CheckpointError(
                    f"{self.folder / INDEX} says that {name!r} is in {shard}, but it is not"
                )
        if extra := self.tensors.keys() - self.index["weight_map"].keys():
            raise CheckpointError(
                f"{self.folder}: tensor {min(extra)!r} is in a shard but not in {INDEX}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.nbytes

    def check_scales(self) -> None:
        """Nothing: no tensor has scales."""

    @contextmanager
    def files(self) -> Iterator[Callable[[str, str], Any]]:
        """A function `(shard, name on disk) -> lazy slice` (safetensors' own), valid inside the
        `with`.

        The files are closed at its end: pages of a file that stays mapped count as memory of the
        process.
        """
        from safetensors import SafetensorError, safe_open

        handles: dict[str, Any] = {}
        with ExitStack() as stack:

            def lazy(shard: str, name: str) -> Any:
                try:
                    if shard not in handles:
                        handles[shard] = stack.enter_context(
                            safe_open(self.folder / shard, framework="pt", device="cpu")
                        )
                    return handles[shard].get_slice(name)
                except SafetensorError as error:  # it is stricter than JSON, and knows fewer dtypes
                    raise CheckpointError(
                        f"{self.folder / shard} is refused by the safetensors library: {error}"
                    ) from None

            yield lazy

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Any]]:
        """A function `name -> lazy slice`, valid inside the `with`; `[...]`, `[index]` and
        `[start:stop]` of a slice read that much.
        """
        with self.files() as lazy:
            yield lambda name: lazy(self.tensors[name].shard, name)

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor, some at a time."""
        yield from self.stored_bytes(self.tensors[name])

    def stored_bytes(self, entry: Entry) -> Iterator[bytes]:
        """The bytes on disk of a tensor, some at a time."""
        yield from byte_range(self.folder / entry.shard, entry.start, entry.stop)

    def read(self, name: str, at: int | None = None) -> Any:
        """One tensor, or only `tensor[at]`, as a copy of its own in memory."""
        with self.opened() as lazy:
            return (lazy(name)[...] if at is None else lazy(name)[at]).clone()


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


def check_sizes(reader: Reader, config: Any) -> None:
    """Refuse a transformers config of a model that cannot be the checkpoint's, before it is built
    and takes the memory.

    Args:
        reader: the checkpoint.
        config: made from its config.json, for the number of layers goes by many names there.

    Raises:
        CheckpointError: more layers than tensors, or a size or count far beyond every dimension of
            every tensor.
    """
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(depth, int) or depth > len(reader.tensors):
        raise CheckpointError(
            f"{reader.folder}: config.json has {depth} layers, the checkpoint "
            f"{len(reader.tensors)} tensors"
        )
    largest = max((size for entry in reader.tensors.values() for size in entry.shape), default=0)
    for key, value in _numbers(reader.config):
        if "position" in key:
            most = _MOST_POSITIONS
        else:
            most = (
                max(4096, 4 * largest)
                if _SIZE.search(key) and not _LENGTH.search(key)
                else math.inf
            )
        if value > most:
            raise CheckpointError(
                f"{reader.folder}: config.json has {key} {value}; no tensor has a dimension above "
                f"{largest}"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a JSON document, each with the nearest key above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float):
        yield key, value


def _only_adapter(folder: Path) -> str:
    """What to do with the folder of an adapter; empty for any other."""
    if not (folder / "adapter_config.json").is_file():
        return ""
    return (
        "it is an adapter without its model: load both with peft, `merge_and_unload()`, save that"
    )


def _no_weights(folder: Path) -> str:
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
    )
    if pickles:
        return (
            f"{folder} has no safetensors weights, only {pickles[0]}: pickle files can run code "
            f"and are not read; convert it with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) where you trust it"
        )
    adapter = _only_adapter(folder)
    return f"{folder} has no {SINGLE} and no {INDEX}{adapter and f': {adapter}'}"


def resolve(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: a local folder as it is, a Hub id downloaded (or found in the cache).

    Raises:
        CheckpointError: no such folder, no such repository, no connection.
    """
    folder = home_path(model)
    if folder.exists():
        return folder
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", model) or model.startswith("."):
        raise CheckpointError(
            f"{model} does not exist: MODEL is a local checkpoint folder or a Hub id such as "
            f"org/name"
        )
    try:
        return _download(model, revision)
    except CheckpointError:
        raise
    except Exception as error:  # the Hub client raises a dozen kinds; each is the same to the user
        reason = " ".join(str(error).partition("An error happened")[0].split()).removeprefix(
            "Got: "
        )[:200]
        raise CheckpointError(
            f"{model} is no folder here, and fetching it from the Hub failed: {reason}"
        ) from None


def _download(model: str, revision: str | None) -> Path:
    """What a run needs of a Hub id: the files beside the weights and the single file or the index
    first, then the shards that the index names, of the same commit.
    """
    from huggingface_hub import snapshot_download

    beside = ["config.json", "report.json", *PATTERNS, "*.py", SINGLE, INDEX]
    folder = Path(
        snapshot_download(model, revision=revision, allow_patterns=beside, ignore_patterns=["*/*"])
    )
    weight_map = {} if (folder / SINGLE).is_file() else _weight_map(folder)
    rest = [f"{TEMPLATES}/*.jinja", *sorted(set(weight_map.values()))]
    return Path(snapshot_download(model, revision=folder.name, allow_patterns=rest))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> shard, checked to be plain file names; nothing where there is no index.

    Raises:
        CheckpointError: the index names none, or others.
    """
    if not (path := folder / INDEX).is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(
            r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors", shard
        ):
            raise CheckpointError(
                f"{path} names the shard {str(shard)[:100]!r}, which is not a plain *.safetensors "
                f"file name"
            )
    return weight_map

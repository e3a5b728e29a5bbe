"""A checkpoint folder on disk: config, headers and index, validated before anything is
believed. No torch at import.

Reading never unpickles and never leaves the folder. Tensors are read one at a time; nothing here
holds a whole shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compressor.checkpoint.header import Entry, byte_range, read_header
from compressor.checkpoint.on_disk import DTYPES, OnDisk
from compressor.checkpoint.side_files import left_files, lfs_pointer, side_files
from compressor.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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


class Reader:
    """A checkpoint folder: `config`, `shards` (file names, in order), `tensors` (name -> Entry),
    `stored` (the same of what lies in the files) and `metadata` per shard.

    Raises:
        CheckpointError: at construction, for anything that does not hold together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        if not (folder / "config.json").is_file():
            missing = "a Hugging Face checkpoint folder is expected"
            raise CheckpointError(f"{folder} has no config.json: {_foreign(folder) or missing}")
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
        self.stored = self.tensors
        self._accepted: set[str] = set()  # shards that the library has opened
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
        weight_map = read_weight_map(self.folder)
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
        if self.stored[name].dtype in DTYPES:
            return self.on_disk(name)[... if at is None else at]
        with self.opened() as lazy:
            return (lazy(name)[...] if at is None else lazy(name)[at]).clone()

    def on_disk(self, name: str) -> OnDisk:
        """The tensor of this name in the files. Raises CheckpointError where the safetensors
        library refuses its file, which is asked once.
        """
        entry = self.stored[name]
        if entry.shard not in self._accepted:
            with self.files() as lazy:
                lazy(entry.shard, name)
            self._accepted.add(entry.shard)
        return OnDisk(self.folder / entry.shard, entry)


def _only_adapter(folder: Path) -> str:
    """What to do with the folder of an adapter; empty for any other."""
    if not (folder / "adapter_config.json").is_file():
        return ""
    return (
        "it is an adapter without its model: load both with peft, `merge_and_unload()`, save that"
    )


def _foreign(folder: Path) -> str:
    """What a folder without a checkpoint of transformers holds, and what to do; empty where that is
    not known.
    """
    names = sorted(path.name for path in folder.iterdir())
    if adapter := _only_adapter(folder):
        return adapter
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{gguf[0]} is a GGUF file; give the safetensors checkpoint that it was made from"
    if "consolidated.safetensors" in names or "consolidated.safetensors.index.json" in names:
        return (
            "consolidated.safetensors has the names of Mistral's own format; give the transformers "
            "form of the checkpoint, which has model.safetensors or an index"
        )
    if "modules.json" in names:
        inside = [path.parent.name for path in sorted(folder.glob(f"*/{SINGLE}"))]
        where = f": give {folder / inside[0]}, if that is a causal language model" if inside else ""
        return f"modules.json describes a sentence-transformers model{where}"
    if shards := [name for name in names if re.fullmatch(r"model-\d+-of-\d+.safetensors", name)]:
        return f"{shards[0]} is a shard without its index: the download is incomplete"
    return ""


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
    other = _foreign(folder)
    return f"{folder} has no {SINGLE} and no {INDEX}{other and f': {other}'}"


def read_weight_map(folder: Path) -> dict[str, str]:
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

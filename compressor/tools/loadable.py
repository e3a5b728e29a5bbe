"""Whether what a loader will look at in a folder can be loaded: the config by its class, every
parameter of the model under its name and in its shape, the tokenizer, the other settings; and that
nothing lies there which would be loaded in their place.

No weight is read: the model is built without memory, as a run builds it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compressor.checkpoint.header import Entry
from compressor.checkpoint.packed_config import (
    GUARD,
    TENSOR,
    TRANSPOSED,
    packed_modules,
    place_of,
    plain_config,
    shared_tensors,
    stored_modules,
)
from compressor.checkpoint.reader import INDEX, Reader
from compressor.checkpoint.side_files import side_files
from compressor.errors import CompressError
from compressor.formats.headers import check_headers, packed_headers

_FOREIGN = {
    "adapter_config.json": "with peft a loader takes the folder for an adapter",
    "adapter_model.*": "it belongs to an adapter",
    "*.index.json": "it is the index of other weights",
    "model*.safetensors": "it is no part of these weights",
    "pytorch_model*.bin": "it holds other weights",
    "tf_model*.h5": "it holds other weights",
    "flax_model*.msgpack": "it holds other weights",
}
_TOKENIZER = ("tokenizer*", "*.model", "*vocab*", "merges*", "*.tiktoken", "*.spm", "tekken.json")


def problems(reader: Reader, *, trust_remote_code: bool = False) -> list[str]:
    """One line for each thing in the folder that does not load, or is not what will be loaded.

    Args:
        reader: the checkpoint.
        trust_remote_code: whether Python code that it brings may run; without it, what needs such
            code is a problem.
    """
    beside = side_files(reader.folder, code=False)
    found = [*_foreign(reader), *_unreadable(reader.folder, beside)]
    if not found:
        found += _model(reader, trust_remote_code)
        found += _settings(reader.folder, beside, trust_remote_code)
    return [*_unguarded(reader), *found]


def _unguarded(reader: Reader) -> Iterator[str]:
    """A config that was saved where the plug-in was not imported."""
    if packed_modules(reader.config) and reader.config.get("transformers_weights") != GUARD:
        yield (
            "config.json has lost `transformers_weights`, which keeps the folder from being loaded "
            "with random weights where compressor.runtime is not imported: import that, load the "
            "config with AutoConfig and save it again"
        )


def _foreign(reader: Reader) -> Iterator[str]:
    """What a loader would take in place of what belongs there, or beside it."""
    own = {*reader.shards, *([INDEX] if reader.index is not None else [])}
    for path in sorted(reader.folder.iterdir()):
        if path.name not in own and path.is_file():
            for pattern, reason in _FOREIGN.items():
                if fnmatchcase(path.name, pattern):
                    yield f"{path.name} does not belong to the checkpoint: {reason}"
                    break


def _unreadable(folder: Path, names: list[str]) -> Iterator[str]:
    for name in names:
        try:
            text = (folder / name).read_bytes()
            if name.endswith(".json"):
                json.loads(text)
            elif name.endswith((".jinja", ".txt")):
                text.decode()
        except (OSError, ValueError, RecursionError) as error:
            kind = "JSON" if name.endswith(".json") else "UTF-8 text"
            yield f"{name} is not readable {kind}: {' '.join(str(error).split())[:200]}"


def _model(reader: Reader, trust_remote_code: bool) -> Iterator[str]:
    """The class of the config builds a model whose parameters are the tensors of the folder."""
    from compressor.model.skeleton import Skeleton

    try:
        Skeleton(_unpacked(reader), trust_remote_code=trust_remote_code)
    except CompressError as error:
        yield str(error)


def _unpacked(reader: Reader) -> Reader:
    """The headers that the folder would have without packed linears. Raises CheckpointError where
    they are not those of its config.
    """
    dense = copy.copy(reader)
    dense.config = plain_config(reader.config)
    dense.tensors = dict(reader.tensors)
    stored = packed_headers(reader.tensors)
    modules = stored_modules(reader.config, reader.tensors)
    count = {tensor: len(names) for tensor, names in shared_tensors(modules).items()}
    for name, entry in modules.items():
        dtype, shape = check_headers(name, entry, parts := stored.get(name, {}))
        shard = dense.tensors[f"{name}.{next(iter(parts))}"].shard
        for suffix in parts:
            del dense.tensors[f"{name}.{suffix}"]
        shape = shape[::-1] if entry.get(TRANSPOSED) is True else shape
        tensor = place_of(entry).get(TENSOR)
        whole = (count[tensor], *shape) if tensor else shape
        dense.tensors[tensor or f"{name}.weight"] = Entry(shard, dtype, whole, 0, 0)
    return dense


def _settings(folder: Path, names: list[str], trust_remote_code: bool) -> Iterator[str]:
    """The tokenizer where there are files of one, and how text is generated."""
    from transformers import AutoTokenizer, GenerationConfig

    def attempt(what: str, load: Any) -> Iterator[str]:
        try:
            load()
        except Exception as error:  # transformers raises many kinds on files it cannot use
            yield f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}"

    if any(fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZER):
        yield from attempt(
            "the tokenizer",
            lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code),
        )
    if "generation_config.json" in names:
        yield from attempt(
            "generation_config.json", lambda: GenerationConfig.from_pretrained(folder)
        )

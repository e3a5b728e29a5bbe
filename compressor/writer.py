"""Writing a checkpoint folder: replaced tensors as they come, everything else copied byte for byte from the input.

A shard is assembled once the last of its replaced tensors has come, so the disk holds the output plus the parts of the
shards under way, and memory one tensor. The safetensors library writes a file only from tensors that are all in memory,
hence the few lines of writer here; the file layout is the library's own. The folder gets its name at the very end:
a run that fails or is interrupted leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from compressor.checkpoint import INDEX, ITEM_BITS, SINGLE, Reader
from compressor.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

_COPY = 1 << 24  # bytes moved at once
_SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab"}
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def report_path(output: Path) -> Path:
    """Where the record of a run goes that differs from run to run: beside the folder, which does not."""
    return output.with_name(f"{output.name}.report.json")


def check_output(output: Path, reader: Reader) -> None:
    """Everything about the output that can be known before work starts.

    Raises:
        OutputError: it exists, is the input, its parent cannot be written, or the disk has too little room.
    """
    if output.resolve() == reader.folder.resolve():
        raise OutputError(f"output {output} is the input folder; choose another with -o")
    if reader.folder.resolve() in output.resolve().parents:
        raise OutputError(f"output {output} is inside the input folder; choose another with -o")
    there = os.path.lexists(output) or output.resolve().exists()  # the second for new/.. and the like
    path = output if there else report_path(output)
    if there or os.path.lexists(path):
        raise OutputError(f"output {path} exists already; choose another with -o or remove it")
    if len(os.fsencode(output.name)) > 200:
        raise OutputError(f"output {str(output)[:60]}… has a name of {len(output.name)} characters; choose a shorter one with -o")
    parent = output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {output} cannot be made: {parent} is not a folder you may write to")
    free = shutil.disk_usage(parent).free
    if free < reader.nbytes:
        raise OutputError(f"output {output} may need {reader.nbytes:,} bytes; {parent} has {free:,} free")


class Writer:
    """Writes `output` from `reader`'s checkpoint; a context manager.

    Args:
        reader: the input checkpoint.
        output: the folder to be made; must not exist.
        replaced: names of the input tensors that `replace` will be called for.
    """

    def __init__(self, reader: Reader, output: Path, replaced: set[str]) -> None:
        self.reader, self.output = reader, output
        self.work = output.parent / f".{output.name}.{os.getpid()}.partial"  # of its own: another run may want the same output
        self.spool = self.work / ".spool"
        self.pending = set(replaced)
        self.parts: dict[str, list[tuple[str, str, list[int], Path]]] = {}
        self.weight_map: dict[str, str] = {}
        self.total = 0
        self.todo = list(reader.shards)

    def __enter__(self) -> Self:
        self.made = [parent for parent in self.output.parents if not parent.exists()]  # innermost first
        try:
            shutil.rmtree(self.work, ignore_errors=True)
            self.spool.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"output {self.output} cannot be made: {error.strerror}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if error is not None:
            for parent in self.made:
                with suppress(OSError):  # somebody else uses it by now
                    parent.rmdir()
        if isinstance(error, OSError):
            raise OutputError(f"output {self.output} could not be written: {error.strerror or error}") from None

    def replace(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors` in place of the input tensor `name`; their names replace its last part."""
        prefix = name.rpartition(".")[0]
        self.pending.remove(name)
        parts = self.parts.setdefault(name, [])
        for suffix, tensor in tensors.items():
            path = self.spool / f"{len(self.parts)}-{suffix}"
            path.write_bytes(_raw(tensor))
            parts.append((f"{prefix}.{suffix}" if prefix else suffix, _dtype(tensor), list(tensor.shape), path))
        self._assemble_ready()

    def _assemble_ready(self) -> None:
        waiting = {self.reader.tensors[name].shard for name in self.pending}
        for shard in [shard for shard in self.todo if shard not in waiting]:
            self.todo.remove(shard)
            self._assemble(shard)

    def _assemble(self, shard: str) -> None:
        """Write one shard: the input's tensors in the input's order, the replaced ones by their parts."""
        pieces: list[tuple[str, str, list[int], Path, int, int]] = []
        own = [(name, entry) for name, entry in self.reader.tensors.items() if entry.shard == shard]
        for name, entry in sorted(own, key=lambda item: (item[1].start, item[1].stop)):
            if name in self.parts:
                pieces += [(*part, 0, part[3].stat().st_size) for part in self.parts[name]]
            else:
                pieces.append((name, entry.dtype, list(entry.shape), self.reader.folder / shard, entry.start, entry.stop))
        pieces.sort(key=lambda piece: -ITEM_BITS[piece[1]])  # stable: wide items first keeps every tensor aligned
        header: dict[str, Any] = {"__metadata__": self.reader.metadata[shard] or {"format": "pt"}}
        position = 0
        for name, dtype, shape, _, start, stop in pieces:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + stop - start]}
            position += stop - start
            self.weight_map[name] = shard
        self.total += position
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self.work / shard).open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            for *_, path, start, stop in pieces:
                _copy_range(path, start, stop, target)
            target.flush()
            os.fsync(target.fileno())
        for *_, path, _, _ in pieces:
            if path.parent == self.spool:
                path.unlink()

    def finish(self, config: Mapping[str, Any], files: Mapping[str, str], *, code: bool = False) -> None:
        """Write the index, `config`, the text `files` and the input's tokenizer and licence files, and name the folder.

        Args:
            config: contents of config.json.
            files: name -> text of further files.
            code: copy the input's Python files too (remote code the user has asked for).
        """
        self._assemble_ready()
        if self.pending or self.todo:
            raise AssertionError(f"finish() before {sorted(self.pending)} were replaced")
        if self.reader.index is not None:
            metadata = {**self.reader.index.get("metadata", {}), "total_size": self.total}
            index = {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))}
            (self.work / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in sorted(self.reader.folder.iterdir()):
            wanted = path.suffix in _SIDE_FILES or path.name.upper().startswith(_SIDE_NAMES) or (code and path.suffix == ".py")
            if wanted and path.is_file() and path.name not in (INDEX, "config.json", "report.json"):
                shutil.copyfile(path, self.work / path.name)
        (self.work / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for name, text in files.items():
            (self.work / name).write_text(text)
        shutil.rmtree(self.spool)
        if self.output.exists():
            raise OutputError(f"output {self.output} has come into being meanwhile; it was left as it is")
        os.replace(self.work, self.output)


def _copy_range(path: Path, start: int, stop: int, target: BinaryIO) -> None:
    with path.open("rb") as source:
        source.seek(start)
        left = stop - start
        while left:
            data = source.read(min(left, _COPY))
            if not data:
                raise OutputError(f"{path} became shorter while it was read")
            target.write(data)
            left -= len(data)


def _raw(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _dtype(tensor: Tensor) -> str:
    names = {
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float64": "F64",
        "int16": "I16",
        "uint8": "U8",
        "int8": "I8",
        "int32": "I32",
    }
    return names[str(tensor.dtype).removeprefix("torch.")]


__all__ = ["SINGLE", "Writer", "check_output"]

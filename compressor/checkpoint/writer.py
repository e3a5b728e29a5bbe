"""Writing a checkpoint folder: replaced tensors as they come, everything else copied byte for byte
from the input.

A shard is assembled once the last of its replaced tensors has come, so the disk holds the output
plus the parts of the shards under way, and memory one tensor. The safetensors library writes a file
only from tensors that are all in memory, hence the few lines of writer here; the file layout is the
library's own. The folder gets its name at the very end: what has the name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from compressor.checkpoint import manifest
from compressor.checkpoint.atomic import sha256, sync, tensor_bytes
from compressor.checkpoint.header import ITEM_BITS, byte_range
from compressor.checkpoint.reader import INDEX, Reader
from compressor.checkpoint.side_files import side_files
from compressor.checkpoint.work_state import (
    beside,
    claim,
    damaged,
    is_complete,
    name_folder,
    remove_dead,
    work_path,
)
from compressor.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


def check_output(output: Path, reader: Reader) -> None:
    """Everything about the output that can be known before work starts.

    Raises:
        OutputError: it exists, is the input, its parent cannot be written, or the disk has too
            little room.
    """
    if not output.name:
        raise OutputError(
            f"output {str(output)!r} names no folder to make; choose another `output`"
        )
    if output.resolve() == reader.folder.resolve():
        raise OutputError(f"output {output} is the input folder; choose another `output`")
    if reader.folder.resolve() in output.resolve().parents:
        raise OutputError(f"output {output} is inside the input folder; choose another `output`")
    there = (
        os.path.lexists(output) or output.resolve().exists()
    )  # the second for new/.. and the like
    if there and not is_complete(output):
        raise OutputError(f"output {output} exists already; choose another `output` or remove it")
    if in_the_way := [path for path in beside(output) if path.is_dir()]:
        raise OutputError(
            f"{in_the_way[0]} is a folder, a file about the output will be written there; choose "
            "another `output` or remove it"
        )
    if len(os.fsencode(output.name)) > 200:
        raise OutputError(
            f"output {str(output)[:60]}… has a name of {len(output.name)} characters; choose a "
            f"shorter `output`"
        )
    parent = output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"output {output} cannot be made: {parent} is not a folder you may write to"
        )
    free = shutil.disk_usage(parent).free + sum(
        path.stat().st_size for path in work_path(output).rglob("*") if path.is_file()
    )
    if free < reader.nbytes:
        raise OutputError(
            f"output {output} may need {reader.nbytes:,} bytes; {parent} has {free:,} free"
        )


class Writer:
    """Writes `output` from `reader`'s checkpoint.

    As a context manager it has a work folder of its own, and `finish` names the output. In the work
    state of a run that may be cut off (`work`) it tells what it has written, can be told so again,
    and leaves the naming to the journal.

    Args:
        reader: the input checkpoint.
        output: the folder to be made; must not exist.
        replaced: names of the input tensors that `replace` will be called for.
        work: an existing folder to work in.

    Attributes:
        folder: what the output will be.
        spool: a file for each shard under way, the tensors of its replaced ones behind each other.
        pending: tensors that are still to be replaced.
        parts: replaced tensor -> its stored tensors: name, dtype, shape, byte range in the spool
            file, sha256.
        shards: finished shard -> its sha256, bytes and tensors.
    """

    def __init__(
        self, reader: Reader, output: Path, replaced: set[str], work: Path | None = None
    ) -> None:
        self.reader, self.output = reader, output
        self.work = work or output.parent / f".{output.name}.{os.getpid()}.partial"
        self.folder, self.spool = self.work / "folder", self.work / "spool"
        self.pending = set(replaced)
        self.waiting = self._count_waiting()
        self.parts: dict[str, list[list[Any]]] = {}
        self.shards: dict[str, dict[str, Any]] = {}
        used = {entry.shard for entry in reader.tensors.values()}
        self.todo = [shard for shard in reader.shards if shard in used]
        self._told: tuple[set[str], set[str]] = (set(), set())
        self.made: list[Path] | None = None
        self._lock: int | None = None
        if work:
            self.folder.mkdir(exist_ok=True)
            self.spool.mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        self.made = [
            parent for parent in self.output.parents if not parent.exists()
        ]  # innermost first
        try:
            remove_dead(self.output)
            self._lock = claim(self.work)
            self.folder.mkdir()
            self.spool.mkdir()
        except OSError as error:
            raise OutputError(f"output {self.output} cannot be made: {error.strerror}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        if error is not None:
            for parent in self.made or []:
                with suppress(OSError):  # somebody else uses it by now
                    parent.rmdir()
        if isinstance(error, OSError):
            raise OutputError(
                f"output {self.output} could not be written: {error.strerror or error}"
            ) from None

    def replace(
        self, name: str, tensors: Mapping[str, Tensor], *, owner: str = "", last: bool = True
    ) -> None:
        """Store `tensors` in place of the input tensor `name`.

        Args:
            name: of the input tensor.
            tensors: by the last part of their names.
            owner: the rest of their names; as that of `name` where it is empty.
            last: no further call is to come that stores more in its place.
        """
        prefix = owner or name.rpartition(".")[0]
        if last:
            self.pending.remove(name)
        parts = self.parts.setdefault(name, [])
        with (self.spool / self.reader.tensors[name].shard).open("ab") as file:
            for suffix, tensor in tensors.items():
                raw, start = tensor_bytes(tensor), file.tell()
                file.write(raw)
                own = f"{prefix}.{suffix}" if prefix else suffix
                digest = hashlib.sha256(raw).hexdigest()
                parts.append(
                    [own, _dtype(tensor), list(tensor.shape), start, start + len(raw), digest]
                )
        shard = self.reader.tensors[name].shard
        self.waiting[shard] -= 1
        if not self.waiting[shard]:
            self._assemble_ready()

    def _count_waiting(self) -> Counter[str]:
        """Tensors that are still to be replaced, per shard: counted, for a mixture has tens of
        thousands.
        """
        return Counter(self.reader.tensors[name].shard for name in self.pending)

    def news(self) -> dict[str, Any]:
        """What was written since the last call, forced to disk, as JSON values for `restore`."""
        parts = {name: self.parts[name] for name in self.parts if name not in self._told[0]}
        shards = {name: self.shards[name] for name in self.shards if name not in self._told[1]}
        for shard in {self.reader.tensors[name].shard for name in parts} - self.shards.keys():
            sync(self.spool / shard)
        sync(self.spool)
        sync(self.folder)
        self._told = set(self.parts), set(self.shards)
        return {"parts": parts, "shards": shards}

    def forget(self) -> None:
        """Remove the spool files of finished shards; what is finished has been recorded."""
        for shard in self.shards:
            (self.spool / shard).unlink(missing_ok=True)

    def restore(self, news: Iterable[Mapping[str, Any]]) -> None:
        """Go on from what earlier calls of `news` told. Raises OutputError where it is not there
        any more, or has changed.
        """
        for one in news:
            self.parts.update(one["parts"])
            self.shards.update(one["shards"])
        self.pending -= self.parts.keys()
        self.waiting = self._count_waiting()
        self.todo = [shard for shard in self.todo if shard not in self.shards]
        self._told = set(self.parts), set(self.shards)
        for path in self.folder.iterdir():  # of the block that was cut off
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.shards:
                path.unlink()
        ends: dict[Path, int] = {}
        try:
            for name, facts in self.shards.items():
                self._check(self.folder / name, 0, facts["bytes"], facts["sha256"])
            for name, parts in self.parts.items():
                path = self.spool / self.reader.tensors[name].shard
                for *_, start, stop, digest in parts if path.name not in self.shards else []:
                    self._check(path, start, stop, digest)
                    ends[path] = max(stop, ends.get(path, 0))
            for path in self.spool.iterdir():
                os.truncate(path, ends[path]) if path in ends else path.unlink()
        except FileNotFoundError as error:
            raise damaged(self.work, f"{error.filename} is missing") from None

    def _check(self, path: Path, start: int, stop: int, digest: str) -> None:
        if sha256(path, start, stop) != digest:
            raise damaged(self.work, f"{path} does not hold what was written to it")

    def _assemble_ready(self) -> None:
        waiting = {self.reader.tensors[name].shard for name in self.pending}
        for shard in [shard for shard in self.todo if shard not in waiting]:
            self.todo.remove(shard)
            self._assemble(shard)

    def _assemble(self, shard: str) -> None:
        """Write one shard: the input's tensors in the input's order, the replaced ones by their
        parts.
        """
        pieces: list[tuple[str, str, list[int], int, Iterator[bytes | memoryview]]] = []
        own = [(name, entry) for name, entry in self.reader.tensors.items() if entry.shard == shard]
        for name, entry in sorted(own, key=lambda item: (item[1].start, item[1].stop)):
            if name in self.parts:
                for part, dtype, shape, start, stop, _ in self.parts[name]:
                    data = byte_range(self.spool / shard, start, stop)
                    pieces.append((part, dtype, shape, stop - start, data))
            else:
                data = self.reader.chunks(name)
                pieces.append((name, entry.dtype, list(entry.shape), entry.nbytes, data))
        # stable: wide items first keeps every tensor aligned
        pieces.sort(key=lambda piece: -ITEM_BITS[piece[1]])
        header: dict[str, Any] = {"__metadata__": self.reader.metadata[shard] or {"format": "pt"}}
        position = 0
        for name, dtype, shape, size, _ in pieces:
            offsets = [position, position + size]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256(head := struct.pack("<Q", len(text)) + text)
        with (self.folder / shard).open("wb") as target:
            target.write(head)
            for *_, data in pieces:
                for chunk in data:
                    target.write(chunk)
                    digest.update(chunk)
            target.flush()
            os.fsync(target.fileno())
        names = [piece[0] for piece in pieces]
        self.shards[shard] = {
            "sha256": digest.hexdigest(),
            "bytes": len(head) + position,
            "data": position,
            "tensors": names,
        }
        if self.made is not None:
            self.forget()

    def complete(
        self, config: Mapping[str, Any], files: Mapping[str, str], *, code: bool = False
    ) -> None:
        """Write everything beside the shards: the index, `config`, the text `files`, the input's
        tokenizer and licence files, and the manifest of it all.

        Args:
            config: contents of config.json.
            files: name -> text of further files.
            code: copy the input's Python files too (remote code the user has asked for).
        """
        self._assemble_ready()
        if self.pending or self.todo:
            raise AssertionError(f"complete() before {sorted(self.pending)} were replaced")
        contents = {
            name: (self.reader.folder / name).read_bytes()
            for name in side_files(self.reader.folder, code=code)
        }
        if self.reader.index is not None:
            metadata = {
                **self.reader.index.get("metadata", {}),
                "total_size": sum(facts["data"] for facts in self.shards.values()),
            }
            weight_map = {
                name: shard for shard, facts in self.shards.items() for name in facts["tensors"]
            }
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            contents[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
        contents["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        contents |= {name: text.encode() for name, text in files.items()}
        hashes = {name: facts["sha256"] for name, facts in self.shards.items()}
        hashes |= {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        contents[manifest.NAME] = manifest.manifest(hashes).encode()
        for name, content in contents.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_bytes(content)
            sync(self.folder / name)
        for folder in {(self.folder / name).parent for name in contents}:
            sync(folder)

    def finish(
        self, config: Mapping[str, Any], files: Mapping[str, str], *, code: bool = False
    ) -> None:
        """`complete`, and give the folder its name."""
        self.complete(config, files, code=code)
        if self.output.exists():
            raise OutputError(
                f"output {self.output} has come into being meanwhile; it was left as it is"
            )
        name_folder(self.folder, self.output)


def _dtype(tensor: Tensor) -> str:
    names = {
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float64": "F64",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint8": "U8",
    }
    return names[str(tensor.dtype).removeprefix("torch.")]

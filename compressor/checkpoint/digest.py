"""What a checkpoint is, by content: two folders have the same digest when they compute the same. No
torch at import.
"""

from __future__ import annotations

from pathlib import Path

from compressor.checkpoint import cache
from compressor.checkpoint.atomic import sha256
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.side_files import names

_RECORDS = {
    "report.json"
}  # say how the weights came about; what is computed does not depend on them
_DECISIVE = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".py"}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file; remembered, as git does, for as long as its size and its times stay
    what they were.
    """
    status = path.stat()
    key = cache.make_key(
        str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    )
    known = cache.load("sha256", key)
    if known and isinstance(known.get("sha256"), str):
        return known["sha256"]
    found = sha256(path)
    cache.save("sha256", key, {"sha256": found})
    return found


def checkpoint_digest(reader: Reader) -> str:
    """A SHA-256 over the shards, config.json, tokenizer and remote code of a checkpoint folder."""
    side = [name for name in names(reader.folder) if Path(name).suffix in _DECISIVE]
    decisive = {
        *reader.shards,
        *(name for name in side if name not in _RECORDS and not name.startswith(".")),
    }
    return cache.make_key([[name, file_sha256(reader.folder / name)] for name in sorted(decisive)])

"""Finished work kept by what it was made from: small JSON files in the user's cache folder. No
torch at import.

`COMPRESS_CACHE` names the folder; otherwise it is `compress-llm` in `XDG_CACHE_HOME` or `~/.cache`.
Whoever removes it loses time, nothing else. A cache that cannot be read or written is no error: the
work is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from typing import Any

from compressor_kernels.cache import cache_folder


def make_key(*parts: Any) -> str:
    """A name for whatever `parts`, JSON values, describe: the same parts give the same name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(kind: str, key: str) -> dict[str, Any] | None:
    """What was saved under `key`, None if nothing (or nothing readable) was."""
    try:
        found = json.loads((cache_folder() / kind / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def save(kind: str, key: str, value: dict[str, Any]) -> None:
    """Keep `value` under `key`; a reader sees the old value or the new one, never a part."""
    path = cache_folder() / kind / f"{key}.json"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(value), encoding="utf-8")
        os.replace(partial, path)


def forget(kind: str, key: str) -> None:
    """Drop what was saved under `key`."""
    with suppress(OSError):
        (cache_folder() / kind / f"{key}.json").unlink(missing_ok=True)

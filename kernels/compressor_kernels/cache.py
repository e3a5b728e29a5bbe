"""Where this product keeps what it would otherwise make again. No torch at import."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`COMPRESS_CACHE`, or else `compress-llm` in `XDG_CACHE_HOME` or `~/.cache`; need not
    exist.
    """
    if own := os.environ.get("COMPRESS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-llm"

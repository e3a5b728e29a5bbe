"""The folder of what a user calls a model: one on disk, or a Hub id, downloaded. No torch
at import."""

from __future__ import annotations

import re
from pathlib import Path

from compressor.checkpoint.reader import INDEX, SINGLE, read_weight_map
from compressor.checkpoint.side_files import PATTERNS, TEMPLATES
from compressor.errors import CheckpointError
from compressor.text import home_path


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
    weight_map = {} if (folder / SINGLE).is_file() else read_weight_map(folder)
    rest = [f"{TEMPLATES}/*.jinja", *sorted(set(weight_map.values()))]
    return Path(snapshot_download(model, revision=folder.name, allow_patterns=rest))

"""Scores of a model where they are found again: `out.eval.json` beside the folder `out`, in
lm-eval's schema. No torch at import.

Beside and not inside, for the folder is the same for the same recipe and the scores are not part of
it. To lm-eval's `results`,
`configs`, `versions`, `n-shot`, `higher_is_better` and `n-samples`, each by task, the file adds
`digest`, the content of the checkpoint that was scored, and `baseline`, the results of the model it
was compared with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.checkpoint.reader import read_json
from compressor.checkpoint.work_state import scores_path
from compressor.errors import CheckpointError

BY_TASK = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def read_scores(folder: Path, digest: str) -> dict[str, Any] | None:
    """The stored scores of `folder`; None where there are none or they belong to other bytes than
    those of `digest`.

    Raises:
        CheckpointError: the file is no such record.
    """
    path = scores_path(folder)
    if not path.is_file():
        return None
    found = read_json(path)
    if found.get("digest") != digest:
        return None
    if not _is_record(found):
        raise CheckpointError(
            f"{path} is no record of `compressor.evaluate`: remove it and score {folder} again"
        )
    return found


def _is_record(found: Mapping[str, Any]) -> bool:
    """Whether everything that is read of a record is of its kind."""
    if not all(isinstance(found.get(key), dict) for key in (*BY_TASK, "config")):
        return False
    baseline = found.get("baseline") or {"results": {}}
    if not isinstance(baseline, dict) or not isinstance(baseline.get("results"), dict):
        return False
    by_task = [
        values
        for key in ("results", "configs", "higher_is_better")
        for values in found[key].values()
    ]
    counts = [count or {} for count in found["n-samples"].values()]
    return (
        all(
            isinstance(values, dict)
            for values in (
                *by_task,
                *baseline["results"].values(),
                *counts,
                found.get("versions_of", {}),
            )
        )
        and all(type(number) is int for count in counts for number in count.values())
        and {"device", "dtype"} <= set(found["config"])
    )


def store_scores(folder: Path, scores: Mapping[str, Any]) -> Path:
    """Write `scores` beside `folder`. What is there of other tasks stays if it is of the same
    bytes, computed the same way.

    Raises:
        OSError: the file cannot be written.
    """
    path = scores_path(folder)
    try:
        before = read_scores(folder, scores["digest"]) or {}
    except CheckpointError:
        before = {}
    way = ("dtype", "device")
    if any(before.get("config", {}).get(key) != scores["config"].get(key) for key in way):
        before = {}
    merged = merge(before, scores)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(merged, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def merge(before: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """`scores` with what `before` knows of further tasks."""
    merged = {**before, **scores}
    for key in BY_TASK:
        merged[key] = {**before.get(key, {}), **scores[key]}
    old, new = before.get("baseline"), scores.get("baseline")
    if old and new and old.get("digest") == new.get("digest"):
        merged["baseline"] = merge(old, new)
    elif old and not new:
        merged["baseline"] = old
    return merged


def metrics(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(task, metric such as `acc,none`, value) for every number of `scores` that is no standard
    error.
    """
    for task, values in scores["results"].items():
        for metric, value in values.items():
            if isinstance(value, float) and "stderr" not in metric:
                yield task, metric, value


def label(metric: str) -> str:
    """A metric such as `kl_divergence,none` for people: `KL divergence`."""
    name = metric.split(",")[0].replace("_", " ")
    return f"KL{name[2:]}" if name.startswith("kl ") else name


def arrow(scores: Mapping[str, Any], task: str, metric: str) -> str:
    """↑ where more is better, ↓ where less is."""
    return "↑" if scores["higher_is_better"].get(task, {}).get(metric.split(",")[0], True) else "↓"

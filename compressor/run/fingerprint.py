"""What must be the same for an unfinished run to go on: then what it goes on to is what one run
would have made.

Files are known by size, modification time and content. Of a shard the content is its header:
reading a large checkpoint whole takes minutes at every start, and a shard that was edited or
fetched again has another time. Of the small files beside them (configuration, tokenizer), which are
copied into the output, it is all of it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.atomic import sha256
from compressor.checkpoint.reader import Reader
from compressor.records.report import versions
from compressor.text import home_path

if TYPE_CHECKING:
    import torch

    from compressor.config.recipe import Recipe


def fingerprint(
    recipe: Recipe, reader: Reader, others: Iterable[str], device: torch.device, processes: int = 1
) -> dict[str, dict[str, Any]]:
    """Options, model, calibration text, machine and versions of a run, as JSON values.

    Args:
        recipe: the options.
        reader: the model.
        others: names of files beside its shards that go into the output.
        device: what computes; bits differ between kinds, and with the number of threads.
        processes: how many share the work.
    """
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    files = {name: reader.folder / name for name in (*reader.shards, "config.json", *others)}
    dataset = home_path(recipe.dataset)
    plan = home_path(recipe.plan)
    return {
        "option": asdict(recipe),
        "model file": {
            name: _file(path, header=name in reader.shards) for name, path in files.items()
        },
        "plan": {recipe.plan: sha256(plan)} if recipe.plan else {},
        "dataset": {recipe.dataset: _time(dataset)} if dataset.is_file() else {},
        "machine": {**machine, "processes": processes},
        "version": versions(),
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first thing that is not the same in two fingerprints, in words; None where they are
    equal.
    """
    for section, values in new.items():
        before = old.get(section, {})
        for key in {**before, **values}:
            if before.get(key) != values.get(key):
                name = f"{section} {key.replace('_', '-') if section == 'option' else key}"
                if section in ("model file", "plan", "dataset"):
                    return f"{name} has changed since"
                return f"{name} was {before.get(key)!r} and is {values.get(key)!r} now"
    return None


def _file(path: Path, *, header: bool) -> list[Any]:
    if not header:
        return [path.stat().st_size, sha256(path)]
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(struct.unpack("<Q", head)[0])
    return [*_time(path), hashlib.sha256(head).hexdigest()]


def _time(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]

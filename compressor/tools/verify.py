"""Whether a finished folder is what it was made to be: checksums, headers, packed tensors,
patterns, finite numbers, and that it loads (loadable.py).

One tensor is in memory at a time. Nothing is repaired: each problem is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.checkpoint import manifest
from compressor.checkpoint.dequantised import open_model
from compressor.checkpoint.packed_config import (
    AT,
    TENSOR,
    module_entry,
    place_of,
    stored_modules,
)
from compressor.checkpoint.reader import Reader, read_json
from compressor.errors import CheckpointError, CompressError, NumericalError
from compressor.formats import Form, form_of
from compressor.formats.dense import Dense
from compressor.formats.headers import packed_headers, unlisted
from compressor.pattern import Pattern
from compressor.tools import loadable


def verify(
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check the folder.

    Args:
        folder: made by `prune`, or by another command that writes SHA256SUMS.
        progress: told how many tensors are checked of how many.
        trust_remote_code: run Python code that the checkpoint brings; what needs it is a problem
            without.

    Returns:
        How many `files`, `tensors` and `linears` were checked, and `problems`, a list of lines.

    Raises:
        CheckpointError: it is no checkpoint folder at all.
    """
    if not folder.is_dir():
        Reader(folder)  # says so
    found = {"files": 0, "tensors": 0, "linears": 0, "problems": manifest.problems(folder)}
    try:
        reader = open_model(folder)
        modules = stored_modules(reader.config, reader.tensors)
        rows = {row["name"]: row for row in _report(folder).get("linears", [])}
    except (CompressError, TypeError, KeyError, AttributeError) as error:
        found["problems"].append(
            str(error)
            if isinstance(error, CompressError)
            else "report.json is no report of this package"
        )
        return found
    found["files"] = sum(path.is_file() for path in folder.iterdir())
    for number, name in enumerate(reader.tensors, 1):
        found["problems"] += _infinite(reader, name)
        progress(number, len(reader.tensors))
    stored = packed_headers(reader.tensors)
    for name, entry in modules.items():
        found["problems"] += _packed(reader, name, entry, stored.get(name, ()), rows.get(name))
    dense = [row for name, row in rows.items() if name not in modules]
    for row in dense:
        found["problems"] += _plain(reader, row)
    stray = unlisted(reader.tensors, modules)
    found["problems"] += [f"{name} is packed, but config.json does not list it" for name in stray]
    found["problems"] += loadable.problems(reader, trust_remote_code=trust_remote_code)
    return {**found, "tensors": len(reader.tensors), "linears": len(modules) + len(dense)}


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    return read_json(path) if path.is_file() else {}


def _infinite(reader: Reader, name: str) -> Iterator[str]:
    from compressor.model.skeleton import require_finite

    try:
        tensor = reader.read(name)
        limit = tensor.dim() == 0 and not bool(tensor.isnan())  # "no limit" is stored as infinite
        if tensor.is_floating_point() and tensor.numel() and not limit:
            # aminmax knows no 8-bit floats
            require_finite(name, tensor.float() if tensor.itemsize < 2 else tensor)
    except (CheckpointError, NumericalError) as error:
        yield str(error).removesuffix("; nothing was written")


def _packed(
    reader: Reader,
    name: str,
    entry: dict[str, Any],
    suffixes: Iterable[str],
    row: dict[str, Any] | None,
) -> Iterator[str]:
    """A packed linear: tensors that belong together, are what config.json says, and are stored in
    the one way there is.
    """
    tensors = {suffix: reader.read(f"{name}.{suffix}") for suffix in suffixes}
    try:
        form = form_of(entry, tensors)
        if module_entry(form.entry, place_of(entry)) != entry:
            raise ValueError(f"config.json says {entry}, its tensors are {form.entry}")
        if extra := set(tensors) - set(form.pack()):
            raise ValueError(f"{min(extra)} does not belong to the format {entry['format']}")
        form.check_canonical()
    except KeyError as error:
        yield f"{name} lacks {error.args[0]}"
    except (ValueError, CompressError) as error:
        yield f"{name} is damaged: {error}"
    else:
        yield from _as_reported(name, form, row)


def _plain(reader: Reader, row: dict[str, Any]) -> Iterator[str]:
    """A linear stored with zeros in place: as sparse as the report says, and legal in its
    pattern.
    """
    where = place_of(row.get("entry") or {})
    name = where.get(TENSOR, f"{row['name']}.weight")
    if name not in reader.tensors:
        yield f"{name}, which report.json names, is not there"
        return
    weight = reader.read(name, where.get(AT))
    yield from _as_reported(row["name"], Dense(weight), row)
    pattern = Pattern.parse(str(row["pattern"])) if row.get("pattern") else None
    if pattern and not (
        _legal(pattern, weight) or _legal(pattern, weight.T)
    ):  # gpt2's Conv1D stores [in, out]
        yield f"{row['name']} has a group with more non-zeros than the pattern {pattern} allows"


def _legal(pattern: Pattern, weight: Tensor) -> bool:
    return weight.shape[1] % pattern.m == 0 and pattern.is_legal(weight)


def _as_reported(name: str, form: Form, row: dict[str, Any] | None) -> Iterator[str]:
    if row and abs(form.sparsity - row["sparsity"]) > 1e-9:
        yield f"{name} has {form.sparsity:.4%} zeros, report.json says {row['sparsity']:.4%}"

"""What a checkpoint is, from its headers and records alone, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.dequantised import DTYPE, DequantisedReader
from compressor.checkpoint.header import ITEM_BITS
from compressor.checkpoint.packed_config import stored_modules
from compressor.checkpoint.reader import Reader, read_json
from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from compressor.formats import Spec


def describe(reader: Reader) -> dict[str, Any]:
    """What the headers, config.json and report.json of a checkpoint say, as `--json` prints it.
    Sparsity is known where a report is; factors have none. Raises CheckpointError where they do not
    belong together.
    """
    modules = stored_modules(reader.config, reader.tensors)
    zeros = _reported_zeros(reader.folder / "report.json")
    linears = [
        *_packed_linears(reader, modules, zeros),
        *_quantised_weights(reader),
        *_plain_linears(reader, modules, zeros),
    ]
    shards = [
        {"name": shard, "bytes": (reader.folder / shard).stat().st_size} for shard in reader.shards
    ]
    dense = reader.stored_nbytes + sum(row["dense_bytes"] - row["bytes"] for row in linears)
    return {
        "folder": str(reader.folder),
        "architecture": _architecture(reader.config),
        "shards": shards,
        "tensors": len(reader.tensors),
        "bytes": reader.stored_nbytes,
        "dense_bytes": dense,
        "ratio": reader.stored_nbytes / dense if dense else 1.0,
        "linears": linears,
        "notes": reader.notes,
    }


def _reported_zeros(report: Path) -> dict[str, float]:
    """Fraction of zeros by linear; empty without a report."""
    try:
        rows = read_json(report).get("linears", []) if report.is_file() else []
        return {row["name"]: float(row["sparsity"]) for row in rows}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise CheckpointError(f"{report} is no report of this package") from None


def _packed_linears(
    reader: Reader, modules: Mapping[str, Mapping[str, Any]], zeros: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    from compressor.formats import form_class
    from compressor.formats.headers import check_headers, packed_headers

    stored = packed_headers(reader.tensors)
    for name, entry in modules.items():
        try:
            dense = check_headers(name, entry, stored.get(name, {}))
        except CheckpointError as error:
            raise CheckpointError(f"{reader.folder}: {error}") from None
        form = form_class(entry["format"])
        size = sum(reader.tensors[f"{name}.{suffix}"].nbytes for suffix in form.SUFFIXES)
        yield _row(name, dense, form.label(entry), zeros.get(name) if form.SPARSE else None, size)


def _quantised_weights(reader: Reader) -> Iterator[dict[str, Any]]:
    """What was quantised, by the names and shapes of the dense tensors."""
    from compressor.formats.form import Spec

    if isinstance(reader, DequantisedReader):
        for name, weight in reader.weights.items():
            stored = sum(reader.stored[part].nbytes for part in weight.parts)
            spec = Spec(DTYPE, weight.shape)
            yield _row(name.removesuffix(".weight"), spec, reader.method, None, stored)


def _plain_linears(
    reader: Reader, modules: Mapping[str, Any], zeros: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    from compressor.formats.dense import Dense
    from compressor.formats.form import Spec

    quantised = reader.weights if isinstance(reader, DequantisedReader) else ()
    for tensor, header in reader.tensors.items():
        name = tensor.removesuffix(".weight")
        matrix = tensor.endswith(".weight") and len(header.shape) == 2
        if matrix and name not in modules and tensor not in quantised:
            spec = Spec(header.dtype, header.shape)
            yield _row(name, spec, Dense.FORMAT, zeros.get(name), header.nbytes)


def _architecture(config: dict[str, Any]) -> str | None:
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else config.get("model_type")
    return found if isinstance(found, str) and found.isprintable() else None


def _row(name: str, weight: Spec, form: str, sparsity: float | None, stored: int) -> dict[str, Any]:
    dense = math.prod(weight.shape) * ITEM_BITS[weight.dtype] // 8
    return {
        "name": name,
        "shape": list(weight.shape),
        "format": form,
        "sparsity": sparsity,
        "bytes": stored,
        "dense_bytes": dense,
        "ratio": stored / dense if dense else 1.0,
    }

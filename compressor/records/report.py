"""The record of a run: what was done to every linear, what was left alone and why, and what it
cost.

`facts()` is the same for the same input, seed and versions; `everything()` adds what differs from
run to run.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass
class LinearRow:
    """One compressed linear.

    Attributes:
        error: ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on calibration tokens, None where there were none.
        held_out_error: the same on samples that nothing was fitted to.
        entry: what config.json says of it.
        tokens: calibration tokens it was given, None where there were none.
        note: what else there is to know.
        pattern: the n:m it has, empty where it has none.
        losses: relative losses that its method started from and arrived at, where it says so.
    """

    name: str
    shape: list[int]
    format: str
    sparsity: float
    error: float | None
    dense_bytes: int
    bytes: int
    entry: dict[str, Any]
    tokens: int | None = None
    note: str = ""
    losses: tuple[float, float] | None = None
    pattern: str = ""
    held_out_error: float | None = None


@dataclass
class BlockRow:
    """One block. `error` is the relative squared error of its output against the dense block on the
    same inputs.
    """

    index: int
    error: float | None


@dataclass
class LeftDense:
    """A weight that was not compressed, and why."""

    name: str
    shape: list[int]
    reason: str


@dataclass
class Report:
    """Everything about one run of `prune`. `allocation` is what chose the goals of the linears
    measured, if anything did,
    `spectra` what ranks were chosen from (compressor/allocation/rank/measured.py), `notes` what
    there is to know of the model's folder.
    """

    recipe: dict[str, Any]
    architecture: str
    parameters: int
    input_bytes: int
    linears: list[LinearRow] = field(default_factory=list)
    blocks: list[BlockRow] = field(default_factory=list)
    left_dense: list[LeftDense] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)
    output_bytes: int = 0
    calibration_tokens: int = 0
    spectra: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, everything: Mapping[str, Any]) -> Self:
        """The report that `everything()` described."""
        known = {entry.name: everything[entry.name] for entry in fields(cls)}
        rows = {"linears": LinearRow, "blocks": BlockRow, "left_dense": LeftDense}
        return cls(
            **{
                **known,
                **{name: [row(**facts) for facts in known[name]] for name, row in rows.items()},
            }
        )

    def facts(self) -> dict[str, Any]:
        """All that the input, the recipe and the versions determine."""
        found = asdict(self)
        del found["run"]
        spectra = found.pop("spectra")  # long: last
        return {**found, "totals": self.totals(), "versions": versions(), "spectra": spectra}

    def everything(self) -> dict[str, Any]:
        """`facts()` and, under `run`, the seconds, the peak memory and the device of this run."""
        return {**self.facts(), "run": self.run}

    def totals(self) -> dict[str, Any]:
        """Sums over the compressed linears."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.linears)
        dense = sum(row.dense_bytes for row in self.linears)
        stored = sum(row.bytes for row in self.linears)
        zeros = sum(row.sparsity * row.shape[0] * row.shape[1] for row in self.linears)
        return {
            "linears": len(self.linears),
            "weights": weights,
            "sparsity": zeros / weights if weights else 0.0,
            "dense_bytes": dense,
            "bytes": stored,
            "ratio": stored / dense if dense else 1.0,
        }


def to_json(value: Any, *, ascii_only: bool = False) -> str:
    """A report as JSON text. A number that is not finite becomes null: JSON has none of these."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=ascii_only, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def versions() -> dict[str, str]:
    """Versions that the result depends on."""
    from importlib.metadata import version

    names = ["compress-llm", "torch", "transformers", "safetensors"]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far: resident host memory, and CUDA memory where a device was
    used.
    """
    import resource
    import sys

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak

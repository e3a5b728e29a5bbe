"""Targets that were chosen, and what by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compressor.engine.plan import Plan


@dataclass(frozen=True)
class Choice:
    """Targets that were chosen.

    Attributes:
        plan: with a target for every linear that is not left dense.
        measured: what they were chosen by, as the report keeps it under `allocation`.
        spectra: what ranks were chosen from, as compressor/allocation/rank/measured.py describes;
            empty where there are none.
    """

    plan: Plan
    measured: dict[str, Any] = field(default_factory=dict)
    spectra: list[dict[str, Any]] = field(default_factory=list)

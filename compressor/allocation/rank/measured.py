"""Measured spectra as the report keeps them: a few points of each, with the ranks that were chosen
from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compressor import text
from compressor.allocation.rank import Spectrum, largest_rank

POINTS = 48  # of each spectrum at most


def points(length: int) -> list[int]:
    """Indices of a spectrum of `length` values, the first and the last among them, dense where it
    falls steeply: i ∝ k².
    """
    most = min(POINTS, length) - 1
    return sorted({round((length - 1) * (step / max(most, 1)) ** 2) for step in range(most + 1)})


def measured(
    spectra: Mapping[str, Spectrum], ranks: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    """One entry for each linear; the experts of a block are one, with mean values and the mean rank
    of those that are factored.

    Args:
        spectra: of the linears, by name.
        ranks: by name; None for those left dense.
    """
    groups: dict[tuple[int | None, str, tuple[int, int]], list[str]] = {}
    for name, spectrum in spectra.items():
        groups.setdefault((*text.place(name), spectrum.shape), []).append(name)
    entries = []
    for (block, part, shape), names in groups.items():
        index = points(min(shape))
        values = torch.stack([spectra[name].values.double()[index] for name in names]).mean(dim=0)
        chosen = [rank for name in names if (rank := ranks[name])]
        entries.append(
            {
                "block": block, "linear": part, "shape": list(shape), "count": len(names),
                "rank": sum(chosen) / len(chosen) if chosen else None,
                "largest_rank": largest_rank(shape),
                "index": index, "values": [float(f"{value:.4g}") for value in values.tolist()],
            }
        )  # fmt: skip
    return entries

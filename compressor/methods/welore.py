"""WeLore: low rank where the spectrum of a weight allows it (Jaiswal et al. 2024,
https://arxiv.org/abs/2407.11239).

One threshold on the singular values of every weight, normalised by (σ - min σ) / (max σ - min σ),
decides the ranks of all (compressor/allocation/rank/welore.py); weights for which factors would not
be smaller stay dense. The factors are those of the plain SVD: no calibration text. Weights that
became factors are the ones worth training afterwards (`compress export --trainable lrc`).
"""

from __future__ import annotations

from compressor.methods.svd import (
    NEEDS_GRADIENTS,
    NEEDS_GRAM,
    NEEDS_INPUTS,
    REFINABLE,
    compress,
    spectrum,
)

RANKS = "welore"

__all__ = [
    "NEEDS_GRADIENTS",
    "NEEDS_GRAM",
    "NEEDS_INPUTS",
    "RANKS",
    "REFINABLE",
    "compress",
    "spectrum",
]

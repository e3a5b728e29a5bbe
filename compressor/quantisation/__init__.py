"""Weights rounded to a few bits: what plain int4 or int3 would give at its bytes. A yardstick for
`compress eval`; nothing is stored in this form.

grid.py   groups of integers with a scale and a zero point each, and rounding to the nearest
gptq.py   rounding column by column, where later columns make up for earlier ones
"""

from compressor.quantisation.gptq import gptq
from compressor.quantisation.grid import Grid, nearest

__all__ = ["Grid", "gptq", "nearest"]

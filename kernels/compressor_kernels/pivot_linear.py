"""The linear of a weight that is stored as rows of its own and what combines them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor_kernels import reference
from compressor_kernels.cpu import ops as cpu_ops
from compressor_kernels.layouts import autocast_dtype, cast
from compressor_kernels.pivot import check_pivots, dense, pivot_op, row_order
from compressor_kernels.sparse24 import check_input, differentiable
from compressor_kernels.stored_linear import features, unwritten
from compressor_kernels.thin_linear import ThinLinear


class PivotLinear(ThinLinear):
    """t = V x, y[pivots] = t, y[rest] = C t, and the bias added.

    Its state is `weight_v` and `weight_c` (and `bias`), parameters that train like those of two
    linears, and the buffer `weight_pivots`. Once it is prepared, `rows` is the order of its rows
    (pivot.py), which is worked out at every call before.
    """

    without_kernels = "two thin products, computed by torch"
    weight_pivots: Tensor
    rows: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank)
        self.weight_v = unwritten(dtype, device, rank, in_features)
        self.weight_c = unwritten(dtype, device, out_features - rank, rank)
        self.bias = unwritten(dtype, device, out_features) if bias else None
        pivots = torch.arange(rank, dtype=torch.int32, device=device)
        self.register_buffer("weight_pivots", pivots)
        self.register_buffer("rows", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]`, for code that looks at a linear's weight."""
        return dense(self.weight_v, self.weight_c, self._rows())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        v, c, bias, dtype = self.weight_v, self.weight_c, self.bias, autocast_dtype(x)
        if dtype is not None:
            x, v, c = cast(x, dtype), cast(v, dtype), cast(c, dtype)
            bias = None if bias is None else cast(bias, dtype)
        check_input(x, self.in_features, v)
        rows = self._rows()
        if differentiable(x, v, c, bias):
            return reference.pivot(x, v, c, rows, bias)
        if self.on_cpu_kernels(x):
            return cpu_ops.pivot(x, v.contiguous(), c.contiguous(), rows, bias)
        return pivot_op(x, v, c, rows, bias, self.semaphore)

    def prepare_(self) -> None:
        """As of every thin linear; and work out the order of the rows. Raises ValueError where
        pivots are damaged.
        """
        self.unpack_()
        super().prepare_()

    def unpack_(self) -> None:
        """Work out the order of the rows alone: two thin products are faster than the dense one
        anywhere. Raises ValueError where pivots are damaged.
        """
        check_pivots(self.weight_pivots, self.out_features)
        self.rows = row_order(self.weight_pivots, self.out_features)

    def extra_repr(self) -> str:
        """Features, bias and rank, as `print(model)` shows them."""
        return f"{features(self)}, rank={self.rank} by pivots"

    def _rows(self) -> Tensor:
        return row_order(self.weight_pivots, self.out_features) if self.rows is None else self.rows

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the stored tensors; other pivots order the rows anew. Damaged ones are an error, and
        the old ones are kept.
        """
        pivots = state_dict.get(f"{prefix}weight_pivots")
        if self.rows is not None and pivots is not None and pivots.shape == (self.rank,):
            try:
                check_pivots(pivots, self.out_features)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or 'the weight'} is damaged: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.rows is not None and not self.weight_pivots.is_meta:
            self.rows = row_order(self.weight_pivots, self.out_features)

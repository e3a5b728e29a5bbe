"""nn.Modules that hold packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor_kernels import reference
from compressor_kernels.packing import check24, pack24, unpack24


class Sparse24Linear(nn.Module):
    """A linear whose weight is stored packed 2:4.

    Its state is always `weight_values` and `weight_metadata` (and `bias`). After `unpack_()` the module computes with a
    plain dense `weight` instead, which is packed again whenever the state is read: saving gives back the same bytes.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        values = torch.empty(out_features, in_features // 2, dtype=dtype, device=device)
        metadata = torch.empty(out_features, -(-in_features // 16), dtype=torch.int16, device=device)
        self.weight_values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("weight_metadata", metadata)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.weight is not None:
            return linear(x, self.weight, self.bias)
        return reference.sparse24(x, self.weight_values, self.weight_metadata, self.bias)

    @torch.no_grad()
    def unpack_(self) -> None:
        """Replace the packed tensors by the dense weight they stand for. Raises ValueError on metadata that is not 2:4."""
        if self.weight is None:
            check24(self.weight_values, self.weight_metadata)
            self.weight = nn.Parameter(unpack24(self.weight_values, self.weight_metadata), requires_grad=False)
            self.weight_values, self.weight_metadata = None, None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        dense = destination.pop(prefix + "weight", None)
        if dense is not None:
            destination[prefix + "weight_values"], destination[prefix + "weight_metadata"] = pack24(dense.detach())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 2:4"

"""Dense linears beside packed ones: one row of x, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor_kernels.cpu import ops as cpu_ops
from compressor_kernels.layouts import InTiles
from compressor_kernels.sparse24 import differentiable


class OneRowLinear(nn.Linear):
    """An `nn.Linear` whose product with one row of x in bfloat16 a CPU kernel computes, as when one
    sequence is decoded.

    torch's reads the weight half as fast, and copies all of it where x is a slice: as the last
    token of a prompt is when it comes to the head.
    """

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """`module` may become one: a plain linear in bfloat16 on the CPU."""
        weight: Any = module.weight if type(module) is nn.Linear else None
        plain = type(weight) is nn.Parameter and weight.is_contiguous()
        return plain and weight.device.type == "cpu" and weight.dtype == torch.bfloat16

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self._kernel_takes(input):
            return cpu_ops.dense(input, self.weight, self.bias)
        return super().forward(input)

    def _kernel_takes(self, x: Tensor) -> bool:
        operands = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return (
            x.numel() == self.in_features == x.shape[-1]
            and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in operands)
            and self.weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and not differentiable(*operands)
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Another process has to load the kernels for itself, and may be where there are none."""
        super().__setstate__(state)
        if not InTiles.usable():
            self.__class__ = nn.Linear

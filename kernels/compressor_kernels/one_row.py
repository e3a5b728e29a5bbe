"""Dense linears beside packed ones: one row of x, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor_kernels.cpu import ops as cpu_ops
from compressor_kernels.layouts import InTiles
from compressor_kernels.sparse24 import differentiable
from compressor_kernels.stored_linear import moves_tensors


class OneRowLinear(nn.Linear):
    """An `nn.Linear` whose product with one row of x in bfloat16 a CPU kernel computes, as when one
    sequence is decoded.

    torch's reads the weight half as fast, and copies all of it where x is a slice: as the last
    token of a prompt is when it comes to the head.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self._kernel_takes(input):
            return cpu_ops.dense(input, self.weight, self.bias)
        return super().forward(input)

    def _kernel_takes(self, x: Tensor) -> bool:
        operands = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return (
            x.numel() == self.in_features == x.shape[-1]
            and type(self.weight) is nn.Parameter
            and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in operands)
            and self.weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and not differentiable(*operands)
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Another process has to load the kernels for itself, and may be where there are none."""
        super().__setstate__(state)
        if not InTiles.usable():
            _become(self, nn.Linear)


def take_over(model: nn.Module) -> None:
    """Make such linears, in place, of the plain ones of `model` in bfloat16 on the CPU."""
    for module in model.modules():
        if type(module) is nn.Linear and not moves_tensors(module):
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
                _become(module, OneRowLinear)


def give_back(model: nn.Module) -> None:
    """Make them plain again."""
    for module in model.modules():
        if type(module) is OneRowLinear:
            _become(module, nn.Linear)


def _become(module: Any, kind: type[nn.Linear]) -> None:
    module.__class__ = kind

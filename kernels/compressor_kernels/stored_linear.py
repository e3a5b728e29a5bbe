"""What is asked of the module of every stored form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StoredLinear(nn.Module):
    """A linear whose state is the stored tensors of its form (and `bias`).

    One that says no more than `weight`, the dense `[out, in]`, and `forward` decompresses at every
    call: the verbs here do nothing. Attributes: `in_features`, `out_features`, and `bias` `[out]`
    or None.
    """

    in_features: int
    out_features: int
    bias: Any
    without_kernels = "packed, unpacked at every call: no kernel runs here"
    """How it computes where none of its kernels runs, as `runtimes` tells it."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of nn.Module; 8-bit floats move with the module and stay what they are. To torch
        `module.half()` is meant for them too.
        """

        def apart(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() and tensor.itemsize == 1:
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            return fn(tensor)

        return super()._apply(apart, recurse)

    def kernels_run(self) -> bool:
        """Whether a kernel computes from what is stored, in its dtype and on its device."""
        return False

    def prepare_(self) -> None:
        """Hold the weight as the kernels of its device take it, where some run."""

    def unpack_(self) -> None:
        """Hold the weight dense, where that is faster. Raises ValueError where it is damaged."""

    def freeze_(self) -> None:
        """Mark what is packed as frozen: no gradient would reach it."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_"):
                parameter.requires_grad_(False)


def moves_tensors(module: nn.Module) -> bool:
    """accelerate brings the tensors of `module` from elsewhere for each call."""
    hook = getattr(module, "_hf_hook", None)
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(t.is_meta for t in tensors) or (hook is not None and getattr(hook, "offload", True))


def unwritten(dtype: torch.dtype, device: torch.device | str | None, *shape: int) -> nn.Parameter:
    """Not written; what loads the weights says whether they train."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def features(module: Any) -> str:
    """Sizes and bias, as `print(model)` shows them of every linear."""
    bias = module.bias is not None
    return f"in_features={module.in_features}, out_features={module.out_features}, bias={bias}"

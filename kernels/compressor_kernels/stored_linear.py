"""What is asked of the module of every stored form."""

from __future__ import annotations

from typing import Any

from torch import nn


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

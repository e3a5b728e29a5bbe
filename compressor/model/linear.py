"""A weight matrix of a decoder block, and which modules compute with one as nn.Linear does."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.packed_config import place
from compressor.checkpoint.reader import Reader

WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block.

    Attributes:
        name: of its tensor on disk, without `.weight`: `model.layers.0.self_attn.q_proj`, or
            `….experts.3.gate_up_proj` where all experts share one.
        tensor: its weight's name on disk.
        module: the module that computes with it; its `weight` is the stored matrix.
        transposed: the module's matrix is `[in, out]` (gpt2's Conv1D, gpt_oss's experts).
        at: its place along the first dimension of a tensor that holds the matrices of all experts;
            None otherwise.
        experts: name of the module whose expert it belongs to; empty for a linear of its own.
        turned: on disk it is the other way round than in the module (Qwen3-VL's experts).
        path: of its module in transformers' model, where that is another than `name`.
    """

    name: str
    tensor: str
    module: Any  # nn.Linear, Conv1D or ExpertLinear
    transposed: bool
    at: int | None = None
    experts: str = ""
    turned: bool = False
    path: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called by."""
        return (self.name, self.path) if self.path else (self.name,)

    @property
    def stored_transposed(self) -> bool:
        """Whether it is `[in, out]` on disk."""
        return self.transposed != self.turned

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the weight; the experts of a block share theirs."""
        if self.experts:
            return f"{self.experts}.{self.module.parameter}"
        return f"{self.path or self.name}.weight"

    @property
    def place(self) -> dict[str, Any]:
        """Where its weight is in a dense checkpoint, as keys of its entry in config.json."""
        return place(self.stored_transposed, self.tensor, self.at)

    @property
    def size(self) -> int:
        """Its number of weights."""
        return self.module.weight.numel()

    def read(self, reader: Reader) -> Tensor:
        """The weight `[out, in]` in its dtype on disk."""
        weight = reader.read(self.tensor, self.at)
        return weight.T.contiguous() if self.stored_transposed else weight

    def get(self) -> Tensor:
        """The weight `[out, in]` it computes with now."""
        weight = self.module.weight.detach()
        return weight.T.contiguous() if self.transposed else weight

    @torch.no_grad()
    def set(self, weight: Tensor) -> None:
        """Compute with `weight` `[out, in]` from now on."""
        parameter = self.module.weight
        parameter.copy_(weight.T if self.transposed else weight)


@dataclass(frozen=True)
class Other:
    """A parameter of a block that is no linear's weight: its name on disk, that in transformers'
    model, its shape, and what it is.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    reason: str


CONVOLUTION = "a convolution"
ROUTER = "router"


def never_compressed(name: str) -> str:
    """Why a linear stays dense whatever is asked for, by its name within the block: what chooses
    experts, and the step sizes of a state space, with whose weight Mamba and its like multiply by
    themselves, past the linear's forward. Empty for all others.
    """
    *above, last = name.split(".")
    if any(each.endswith("router") for each in (*above, last)):
        return ROUTER
    return "a step size" if last == "dt_proj" else ""


def own_linear(path: str, tensor: str, module: nn.Module, transposed: bool) -> Linear:
    """The linear of the module `path`, named as its tensor is."""
    name = tensor.removesuffix(".weight")
    return Linear(name, tensor, module, transposed, path="" if name == path else path)


def computes_as_linear(module: nn.Module) -> bool:
    """Whether a module computes y = W x + b from its weight. A subclass of nn.Linear may do else (a
    product for each group of inputs): then neither statistics nor packed modules fit it.
    """
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if forward is nn.Linear.forward or forward is Conv1D.forward:
        return True
    if not isinstance(module, nn.Linear):
        return False
    key = (type(module), module.in_features, module.out_features, module.bias is None)
    if key not in _MULTIPLIES:
        _MULTIPLIES[key] = _multiplies(module)
    return _MULTIPLIES[key]


_MULTIPLIES: dict[tuple[type, int, int, bool], bool] = {}
"""What was found of subclasses with a forward of their own, by class and shape."""


@torch.no_grad()
def _multiplies(module: nn.Linear) -> bool:
    """Whether a forward that is not that of nn.Linear gives its result, tried on random numbers."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(module)  # its tensors only: whatever else the forward looks at stays
    twin._parameters = {
        name: None
        if tensor is None
        else nn.Parameter(torch.randn(tensor.shape, generator=generator))
        for name, tensor in module._parameters.items()
    }
    x = torch.randn(1, 3, module.in_features, generator=generator)
    try:
        y = twin.forward(x)
    except Exception:  # whatever it wants is not what nn.Linear takes
        return False
    exact = nn.functional.linear(x, twin.weight, twin.bias)
    alike = isinstance(y, Tensor) and y.shape == exact.shape
    return alike and torch.allclose(y, exact, rtol=1e-4, atol=1e-4)

"""nn.Modules that hold packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor_kernels import reference
from compressor_kernels.packing import check24, pack24, unpack24


def _core(module: Any) -> Tensor:
    """The dense 2:4 core of a module, held or unpacked for the moment."""
    if module.weight_core is not None:
        return module.weight_core
    return unpack24(module.weight_values, module.weight_metadata)


def _unpack(module: Any) -> None:
    """Hold the dense core instead of the packed tensors; ValueError on metadata that is not 2:4."""
    if module.weight_core is None:
        check24(module.weight_values, module.weight_metadata)
        module.weight_core = nn.Parameter(_core(module), requires_grad=False)
        module.weight_values, module.weight_metadata = None, None


def _pack_state(destination: dict[str, Any], prefix: str) -> None:
    """In a state that was just read, put the packed tensors in place of a dense core."""
    core = destination.pop(prefix + "weight_core", None)
    if core is not None:
        destination[prefix + "weight_values"], destination[prefix + "weight_metadata"] = pack24(core.detach())


class Sparse24Linear(nn.Module):
    """A linear whose weight is stored packed 2:4.

    Its state is always `weight_values` and `weight_metadata` (and `bias`). After `unpack_()` the module computes with the
    dense weight instead, which is packed again whenever the state is read: saving gives back the same bytes.
    """

    weight_values: Any  # parameter; None once unpacked
    weight_metadata: Any  # buffer; None once unpacked
    weight_core: Any  # None until unpacked

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
        self.register_parameter("weight_core", None)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]`, for code that looks at a linear's weight; unpacked anew while packed."""
        return _core(self)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.weight_core is not None:
            return linear(x, self.weight_core, self.bias)
        return reference.sparse24(x, self.weight_values, self.weight_metadata, self.bias)

    @torch.no_grad()
    def unpack_(self) -> None:
        """Replace the packed tensors by the dense weight they stand for. Raises ValueError on metadata that is not 2:4."""
        _unpack(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _pack_state(destination, prefix)

    def extra_repr(self) -> str:
        """Features and bias, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 2:4"


class ArmorLinear(nn.Module):
    """A linear stored as a packed 2:4 core between block-diagonal wrappers: y = A (S (B x)) + bias.

    Its state is always `weight_values`, `weight_metadata`, `weight_a` and `weight_b` (and `bias`). After `unpack_()` the
    core is held as a plain dense `weight_core`, which is packed again whenever the state is read: saving gives back the
    same bytes. The wrappers stay apart; multiplied into one dense weight they would have to be factored again to be saved.
    """

    weight_values: Any  # parameter; None once unpacked
    weight_metadata: Any  # buffer; None once unpacked
    weight_core: Any  # None until unpacked

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_a: int,
        block_b: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if out_features % block_a or in_features % block_b:
            raise ValueError(f"blocks of {block_a} and {block_b} do not divide {out_features} outputs and {in_features} inputs")
        self.in_features, self.out_features = in_features, out_features

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_values = parameter(out_features, in_features // 2)
        self.register_buffer("weight_metadata", torch.empty(out_features, -(-in_features // 16), dtype=torch.int16, device=device))
        self.weight_a = parameter(out_features // block_a, block_a, block_a)
        self.weight_b = parameter(in_features // block_b, block_b, block_b)
        self.bias = parameter(out_features) if bias else None
        self.register_parameter("weight_core", None)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]` the factors stand for, for code that looks at a linear's weight."""
        columns = torch.eye(self.in_features, dtype=self.weight_a.dtype, device=self.weight_a.device)
        wrapped = linear(reference.block_diagonal(columns, self.weight_b), _core(self))
        return reference.block_diagonal(wrapped, self.weight_a).T

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.weight_core is None:
            return reference.armor(x, self.weight_values, self.weight_metadata, self.weight_a, self.weight_b, self.bias)
        y = reference.block_diagonal(linear(reference.block_diagonal(x, self.weight_b), self.weight_core), self.weight_a)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def unpack_(self) -> None:
        """Replace the packed core by the dense one it stands for. Raises ValueError on metadata that is not 2:4."""
        _unpack(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _pack_state(destination, prefix)

    def extra_repr(self) -> str:
        """Features, bias and block sizes, as `print(model)` shows them."""
        blocks = f"blocks of {self.weight_a.shape[1]} and {self.weight_b.shape[1]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 2:4 between {blocks}"
        )


class LowRankLinear(nn.Module):
    """A linear stored as the product of two thin factors: y = U (V x) + bias. Its state is `weight_u`, `weight_v` (and `bias`)."""

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
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_u = parameter(out_features, rank)
        self.weight_v = parameter(rank, in_features)
        self.bias = parameter(out_features) if bias else None

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]` the factors stand for, for code that looks at a linear's weight."""
        return self.weight_u @ self.weight_v

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return reference.lowrank(x, self.weight_u, self.weight_v, self.bias)

    def unpack_(self) -> None:
        """Nothing to do: two thin products are faster than the dense one anywhere."""

    def extra_repr(self) -> str:
        """Features, bias and rank, as `print(model)` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, rank={self.rank}"

"""nn.Modules that hold packed weights.

A packed core is held in one of three ways: as it is stored, in the layout of the kernels
(`prepare_`), or dense (`unpack_`). The state that is read and saved is the stored one, always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor_kernels import backend, reference
from compressor_kernels.armor import armor
from compressor_kernels.fragments import Fragments, from_fragments, to_fragments
from compressor_kernels.lowrank import lowrank
from compressor_kernels.packing import check24, pack24, unpack24
from compressor_kernels.sparse24 import new_semaphore, sparse24, sparse24_fragments


class _Packed(nn.Module):
    """What the linears with a 2:4 core share: the three ways to hold it."""

    in_features: int
    out_features: int
    weight_values: Any  # parameter; None once unpacked or prepared
    weight_metadata: Any  # buffer, likewise
    weight_core: Any  # None until unpacked
    weight_fragments: Any  # None until prepared
    weight_words: Any  # None until prepared
    semaphore: Any  # None until prepared

    def _hold(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        rows, columns = self.out_features, self.in_features
        self.weight_values = nn.Parameter(
            torch.empty(rows, columns // 2, dtype=dtype, device=device), requires_grad=False
        )
        self.register_buffer(
            "weight_metadata",
            torch.empty(rows, -(-columns // 16), dtype=torch.int16, device=device),
        )
        self.register_parameter("weight_core", None)
        self.register_parameter("weight_fragments", None)
        self.register_buffer("weight_words", None)
        self.register_buffer("semaphore", None, persistent=False)

    @property
    def packed(self) -> tuple[Tensor, Tensor] | Fragments:
        """The core as the ops take it: values and metadata, or in fragment order. Not once it is
        unpacked.
        """
        if self.weight_fragments is not None:
            return Fragments(self.weight_fragments, self.weight_words)
        return self.weight_values, self.weight_metadata

    @property
    def core(self) -> Tensor:
        """The dense 2:4 core `[out, in]`, held or unpacked for the moment."""
        return unpack24(*self._stored()) if self.weight_core is None else self.weight_core

    def _stored(self) -> tuple[Tensor, Tensor]:
        packed = self.packed
        return (
            from_fragments(packed, self.out_features, self.in_features)
            if isinstance(packed, Fragments)
            else packed
        )

    @torch.no_grad()
    def prepare_(self) -> None:
        """Hold the core in the layout that the kernels of its device read. Raises ValueError on
        metadata that is not 2:4.

        Where no kernel runs nothing changes.
        """
        if self.weight_values is None or not backend.runs(self.weight_values):
            return
        check24(self.weight_values, self.weight_metadata)
        device = self.weight_values.device
        self.semaphore = new_semaphore(self.out_features, device)
        if backend.sparse_tensor_cores(device):
            fragments, self.weight_words = to_fragments(self.weight_values, self.weight_metadata)
            self.weight_fragments = nn.Parameter(fragments, requires_grad=False)
            self.weight_values, self.weight_metadata = None, None

    @torch.no_grad()
    def unpack_(self) -> None:
        """Hold the dense core instead of the packed one. Raises ValueError on metadata that is not
        2:4.
        """
        if self.weight_core is None:
            check24(*self._stored())
            self.weight_core = nn.Parameter(self.core, requires_grad=False)
            self.weight_values = self.weight_metadata = self.weight_fragments = (
                self.weight_words
            ) = self.semaphore = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_values is None:
            for name in ("core", "fragments", "words"):
                destination.pop(f"{prefix}weight_{name}", None)
            core = self.weight_core
            stored = self._stored() if core is None else pack24(core.detach())
            destination[prefix + "weight_values"], destination[prefix + "weight_metadata"] = (
                part.detach() for part in stored
            )


class Sparse24Linear(_Packed):
    """A linear whose weight is stored packed 2:4.

    Its state is always `weight_values` and `weight_metadata` (and `bias`). After `unpack_()` the
    module computes with the dense weight instead, which is packed again whenever the state is read:
    saving gives back the same bytes.
    """

    siblings: Any  # a `siblings.Siblings` that computes for this module too, or None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._hold(dtype, device)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None
        )
        self.siblings = None

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]`, for code that looks at a linear's weight; unpacked anew
        while packed.
        """
        return self.core

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.siblings is not None:
            return self.siblings(self, x)
        return self.alone(x)

    def alone(self, x: Tensor) -> Tensor:
        """`forward` without the siblings."""
        if self.weight_core is not None:
            return linear(x, self.weight_core, self.bias)
        packed = self.packed
        if isinstance(packed, Fragments):
            return sparse24_fragments(x, packed, self.out_features, self.bias, self.semaphore)
        return sparse24(x, *packed, self.bias, self.semaphore)

    def unpack_(self) -> None:
        """Replace the packed tensors by the dense weight they stand for. Raises ValueError on
        metadata that is not 2:4.
        """
        self.part()
        super().unpack_()

    def part(self) -> None:
        """Compute alone from now on, and let the siblings do so too."""
        for member in self.siblings.linears if self.siblings is not None else ():
            member.siblings = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.part()  # what moves or is cast leaves the tensor that the siblings share
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Features and bias, as `print(model)` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, 2:4"
        )


class ArmorLinear(_Packed):
    """A linear stored as a packed 2:4 core between block-diagonal wrappers: y = A (S (B x)) + bias.

    Its state is always `weight_values`, `weight_metadata`, `weight_a` and `weight_b` (and `bias`).
    After `unpack_()` the core is held as a plain dense `weight_core`, which is packed again
    whenever the state is read: saving gives back the same bytes. The wrappers stay apart;
    multiplied into one dense weight they would have to be factored again to be saved.
    """

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
            raise ValueError(
                f"blocks of {block_a} and {block_b} do not divide {out_features} outputs and "
                f"{in_features} inputs"
            )
        self.in_features, self.out_features = in_features, out_features

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self._hold(dtype, device)
        self.weight_a = parameter(out_features // block_a, block_a, block_a)
        self.weight_b = parameter(in_features // block_b, block_b, block_b)
        self.bias = parameter(out_features) if bias else None

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]` the factors stand for, for code that looks at a linear's
        weight.
        """
        columns = torch.eye(
            self.in_features, dtype=self.weight_a.dtype, device=self.weight_a.device
        )
        wrapped = linear(reference.block_diagonal(columns, self.weight_b), self.core)
        return reference.block_diagonal(wrapped, self.weight_a).T

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.weight_core is None:
            return armor(x, self.packed, self.weight_a, self.weight_b, self.bias, self.semaphore)
        y = reference.block_diagonal(
            linear(reference.block_diagonal(x, self.weight_b), self.weight_core), self.weight_a
        )
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Features, bias and block sizes, as `print(model)` shows them."""
        blocks = f"blocks of {self.weight_a.shape[1]} and {self.weight_b.shape[1]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, 2:4 between {blocks}"
        )


class LowRankLinear(nn.Module):
    """A linear stored as the product of two thin factors: y = U (V x) + bias. Its state is
    `weight_u`, `weight_v` (and `bias`).
    """

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
        self.register_buffer("semaphore", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]` the factors stand for, for code that looks at a linear's
        weight.
        """
        return self.weight_u @ self.weight_v

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return lowrank(x, self.weight_u, self.weight_v, self.bias, self.semaphore)

    def prepare_(self) -> None:
        """Give the kernels what they count in, where they run."""
        if backend.runs(self.weight_u):
            self.semaphore = new_semaphore(max(self.out_features, self.rank), self.weight_u.device)

    def unpack_(self) -> None:
        """Nothing to do: two thin products are faster than the dense one anywhere."""

    def extra_repr(self) -> str:
        """Features, bias and rank, as `print(model)` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}"
        )

"""nn.Modules that hold packed weights.

A 2:4 core is held in one layout at a time (layouts.py). Whatever it is, the state that is read,
saved and loaded is the stored one. What is packed is frozen; biases and low-rank factors are
parameters like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor_kernels import reference
from compressor_kernels.cpu import ops as cpu_ops
from compressor_kernels.fused_projections import FusedProjections
from compressor_kernels.layouts import (
    Dense,
    Layout,
    Stored,
    autocast_dtype,
    cast,
    kernel_layout,
)
from compressor_kernels.lowrank import lowrank_op
from compressor_kernels.packing import fill_empty_groups
from compressor_kernels.sparse24 import check_input, differentiable
from compressor_kernels.stored_linear import StoredLinear, features, moves_tensors, unwritten
from compressor_kernels.thin_linear import ThinLinear

STORED = ("weight_values", "weight_metadata")  # a core in the state


class PackedLinear(StoredLinear):
    """What the linears with a 2:4 core share: the tensors of its layout are their own parameters
    and buffers.

    Attributes:
        layout: the class of the layout that holds the core.
        op: what kernel_config.py calls the product in the order of fragments.
    """

    layout: type[Layout]
    op: str

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
        self._register(Stored.unwritten(out_features, in_features, dtype, device))
        self.bias = unwritten(dtype, device, out_features) if bias else None
        self._before_hooks: type[Layout] | None = None

    @property
    def core(self) -> Layout:
        """The 2:4 core as it is held now."""
        parameters, buffers = self._parameters, self._buffers
        tensors = [
            parameters[name] if name in parameters else buffers[name] for name in self.layout.names
        ]
        return self.layout(self.out_features, self.in_features, *tensors)

    @property
    def placed(self) -> bool:
        """A layout was chosen for the core; it is no longer held as it was loaded."""
        return self.layout is not Stored or self.weight_metadata.dtype != torch.int16

    def hold(self, core: Layout) -> None:
        """Let go of the core as it was held, and hold this one."""
        for name in self.layout.names:
            delattr(self, name)
        self._register(core)

    @torch.no_grad()
    def place_(self, layout: type[Layout]) -> None:
        """Hold the core in `layout`. Raises ValueError, and changes nothing, on metadata that is
        not 2:4.
        """
        self.hold(layout.prepare(*self.core.stored()))

    def kernels_run(self) -> bool:
        """Whether there is a layout that a kernel computes from."""
        return kernel_layout(self.core.stored()[0]) is not None

    def prepare_(self) -> None:
        """Hold the core in the layout from which its device computes fastest. Where no kernel runs
        nothing changes.
        """
        if layout := kernel_layout(self.core.stored()[0]):
            self.place_(layout)

    def unpack_(self) -> None:
        """Hold the core dense. Raises ValueError as `place_`."""
        self.place_(Dense)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy may come to a process that has to load the kernels, or to a machine without."""
        super().__setstate__(state)
        if not self.layout.usable() and not getattr(self, self.layout.names[0]).is_meta:
            self.place_(Dense)

    def _register(self, core: Layout) -> None:
        self.layout = type(core)
        for name, tensor in zip(core.names, core.tensors, strict=True):
            if tensor is not None and tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=name != "semaphore")

    def _operands(self, x: Tensor) -> tuple[Tensor, Layout, Tensor | None]:
        """x, the core and the bias of a product; autocast gives all of them its dtype."""
        core, bias, dtype = self.core, self.bias, autocast_dtype(x)
        if dtype is not None:
            x, core = cast(x, dtype), core.cast(dtype)
            bias = None if bias is None else cast(bias, dtype)
        return x, core, bias

    def __getattr__(self, name: str) -> Any:
        """The stored tensors can be read in every layout."""
        if name in STORED and name not in self.layout.names:
            return self.core.stored()[STORED.index(name)]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """See to it that what moves or replaces tensors by their names in the state finds them.

        accelerate's hooks do so; of what they put on a module `_old_forward` is the first and
        `_hf_hook` the last.
        """
        if name in STORED and name not in self.layout.names:
            text = f"{name} cannot be set while the core is held as {self.layout.__name__}"
            raise AttributeError(f"{text}; load_state_dict takes it")
        super().__setattr__(name, value)
        if name == "_old_forward" and self.placed:
            self._before_hooks = self.layout
            self.hold(Stored(self.out_features, self.in_features, *self.core.stored(), None))
        elif name == "_hf_hook" and not moves_tensors(self):
            self._after_hooks()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "_old_forward":
            self._after_hooks()

    def _after_hooks(self) -> None:
        """Go back to the layout there was before the hooks, if the tensors are at hand again."""
        layout, self._before_hooks = self._before_hooks, None
        if layout is not None and not self.weight_values.is_meta:
            self.place_(layout if layout.runs_on(self.weight_values) else Stored)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.placed:
            for name in self.layout.names:
                destination.pop(prefix + name, None)
            for name, tensor in zip(STORED, self.core.stored(), strict=True):
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

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
        """Load the stored tensors, check them, and hold them as the old ones were held; after an
        error these are kept.
        """
        held, placed, before = self.core, self.placed, len(error_msgs)
        if placed:
            copies = (tensor.clone() for tensor in held.stored())
            self.hold(Stored(self.out_features, self.in_features, *copies, None))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not placed:
            return
        given = any(prefix + name in state_dict for name in STORED)
        at_hand = not (self.weight_values.is_meta or self.weight_metadata.is_meta)
        if given and at_hand and len(error_msgs) == before:
            try:
                fill_empty_groups(self.weight_values, self.weight_metadata)
                return self.place_(type(held))
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or 'the weight'} is damaged: {error}")
        self.hold(held)


class Sparse24Linear(PackedLinear):
    """A linear whose weight is stored packed 2:4. Its state is `weight_values` and
    `weight_metadata` (and `bias`).
    """

    op = "fragments"
    fused: FusedProjections | None = None  # computes for this module too
    place: int  # among the linears that it computes for

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]`, for code that looks at a linear's weight; decompressed anew
        unless it is held so.
        """
        return self.core.dense()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.fused is not None and self.fused.takes(x):
            return self.fused(self.place, x)
        return self.alone(x)

    def alone(self, x: Tensor) -> Tensor:
        """`forward` of this module only."""
        x, core, bias = self._operands(x)
        return core.linear(x, bias)

    def hold(self, core: Layout) -> None:
        """Let go of the core as it was held, and hold this one; it leaves the tensors that are
        fused.
        """
        self.part()
        super().hold(core)

    def __setattr__(self, name: str, value: Any) -> None:
        """Another bias leaves the joined one."""
        if name == "bias":
            self.part()
        super().__setattr__(name, value)

    def part(self) -> None:
        """Compute alone from now on, and let the linears fused with this one do so too."""
        for member in self.fused.linears if self.fused is not None else ():
            member.fused = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.part()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy computes alone."""
        return {**self.__dict__, "fused": None}

    def extra_repr(self) -> str:
        """Features and bias, as `print(model)` shows them."""
        return f"{features(self)}, 2:4"


class ArmorLinear(PackedLinear):
    """A linear stored as a packed 2:4 core between block-diagonal factors: y = A (S (B x)) + bias.

    Its state is `weight_values`, `weight_metadata`, `weight_a` and `weight_b` (and `bias`). Where
    the core is held dense the factors stay apart; multiplied into one dense weight they would have
    to be factored again to be saved.
    """

    op = "armor"

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
        if out_features % block_a or in_features % block_b:
            raise ValueError(
                f"blocks of {block_a} and {block_b} do not divide {out_features} outputs"
                f" and {in_features} inputs"
            )
        super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=device)
        self.weight_a = unwritten(dtype, device, out_features // block_a, block_a, block_a)
        self.weight_b = unwritten(dtype, device, in_features // block_b, block_b, block_b)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]` the factors stand for, for code that looks at a linear's
        weight.
        """
        columns = torch.eye(
            self.in_features, dtype=self.weight_a.dtype, device=self.weight_a.device
        )
        inner = reference.block_diagonal(columns, self.weight_b) @ self.core.dense().T
        return reference.block_diagonal(inner, self.weight_a).T

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        x, core, bias = self._operands(x)
        parameters: Any = self._parameters
        a, b = parameters["weight_a"], parameters["weight_b"]
        if a.dtype != core.dtype or a.requires_grad or b.requires_grad:
            a, b = a.detach().to(core.dtype), b.detach().to(core.dtype)
        return core.armor(x, a, b, bias)

    def extra_repr(self) -> str:
        """Features, bias and block sizes, as `print(model)` shows them."""
        blocks = f"blocks of {self.weight_a.shape[1]} and {self.weight_b.shape[1]}"
        return f"{features(self)}, 2:4 between {blocks}"


class LowRankLinear(ThinLinear):
    """A linear stored as the product of two thin factors: y = U (V x) + bias.

    Its state is `weight_u` and `weight_v` (and `bias`), plain parameters that train like those of
    two linears.
    """

    without_kernels = "two thin factors, multiplied by torch"

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
        self.weight_u = unwritten(dtype, device, out_features, rank)
        self.weight_v = unwritten(dtype, device, rank, in_features)
        self.bias = unwritten(dtype, device, out_features) if bias else None

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]` the factors stand for, for code that looks at a linear's
        weight.
        """
        return self.weight_u @ self.weight_v

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        u, v, bias, dtype = self.weight_u, self.weight_v, self.bias, autocast_dtype(x)
        if dtype is not None:
            x, u, v = cast(x, dtype), cast(u, dtype), cast(v, dtype)
            bias = None if bias is None else cast(bias, dtype)
        check_input(x, self.in_features, v)
        if differentiable(x, u, v, bias):
            return reference.lowrank(x, u, v, bias)
        if self.on_cpu_kernels(x):
            return cpu_ops.lowrank(x, u.contiguous(), v.contiguous(), bias)
        return lowrank_op(x, u, v, bias, self.semaphore)

    def extra_repr(self) -> str:
        """Features, bias and rank, as `print(model)` shows them."""
        return f"{features(self)}, rank={self.rank}"

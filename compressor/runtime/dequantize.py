"""A packed model made plain again, in place: the modules of the family, with the weights that
`compress unpack` would write for them.

Each packed module keeps the module that it took the place of. That one gets its parameters back,
and what was hung on the packed one since: the hooks of its user and accelerate's, training mode.
Weights that accelerate keeps elsewhere (on disk, say) stay there packed, and are unpacked each time
they are brought in: dense, they may not fit where they are now.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressor.errors import CheckpointError, UsageError
from compressor.formats import form_of
from compressor.model.experts import biases
from compressor.model.hf_conversion import saving_steps
from compressor.runtime.packed_experts import PackedExperts
from compressor_kernels.one_row import give_back

_HOOKS = ("_forward_", "_backward_", "_is_full_backward_hook")  # nn.Module's own, in its __dict__


def make_plain(model: Any, dtype: torch.dtype | None) -> None:
    """Replace every packed module of `model`, one at a time.

    Args:
        model: loaded, wherever its weights are.
        dtype: of the whole model; None leaves it as it is. Parameters that the family keeps in
            another dtype than its linears stay.

    Raises:
        CheckpointError: a packed weight is damaged.
        UsageError: a dtype, and weights that accelerate keeps elsewhere in another one.
    """
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "original" in vars(module):
            places.setdefault(id(module), []).append(path)
    weights = [_Weights(paths[0], model.get_submodule(paths[0])) for paths in places.values()]
    if dtype is not None and (
        kept := [w.dtype for w in weights if w.elsewhere and w.dtype != dtype]
    ):
        raise UsageError(
            f"some weights are offloaded, as {kept[0]}: load the model with dtype={dtype} and call "
            f"dequantize() without one"
        )
    trainable = _trainable(model, [path for paths in places.values() for path in paths])
    stored, stacks = {held.dtype for held in weights}, []
    for paths in places.values():
        held = weights.pop(0)  # the last that knows the packed module, which is freed with it
        if isinstance(held.packed, PackedExperts):
            stacks += [f"{held.path}.{name}" for name in held]
        frozen = held.path.endswith(".base_layer")  # an adapter trains in its place
        original = _plain(held, trainable and not frozen)
        for path in paths:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, original)
    give_back(model)
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.dtype in stored:
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    if stacks:
        model._weight_conversions = saving_steps(model, stacks)


def _trainable(model: nn.Module, packed: Sequence[str]) -> bool:
    """Whether plain parameters of the model are: one that was frozen whole stays frozen."""
    adapted = [path.removesuffix("base_layer") for path in packed if path.endswith(".base_layer")]
    skipped = tuple([f"{path}." for path in packed] + adapted)
    return any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith(skipped)
    )


class _Weights(Mapping[str, Tensor]):
    """The parameters that the original of a packed module has, by name, unpacked when asked for.

    As a mapping it also is what accelerate's hooks bring a module's tensors from.

    Args:
        path: of the module in its model.
        packed: a packed linear, or PackedExperts.

    Attributes:
        elsewhere: accelerate keeps some of its tensors elsewhere.
        dtype: of the packed weights.
    """

    def __init__(self, path: str, packed: Any) -> None:
        self.path, self.packed = path, packed
        linears = list(_linears(packed))
        self.elsewhere = any(_hook_with_weights(linear) is not None for linear in linears)
        self.dtype = next(
            t for t in linears[0].state_dict().values() if t.is_floating_point()
        ).dtype
        self.parts: dict[str, Callable[[], Tensor]] = {}
        if isinstance(packed, PackedExperts):
            for stack in packed.leaves:
                self.parts[stack] = lambda stack=stack: self._stack(stack)
            for bias in biases(packed.original):
                self.parts[bias] = lambda bias=bias: _tensors(packed)[bias]
        else:
            self.parts["weight"] = self._weight
            if packed.bias is not None:
                self.parts["bias"] = lambda: _tensors(packed)["bias"]

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def _weight(self) -> Tensor:
        weight = _dense(self.path, self.packed)
        return weight.T.contiguous() if isinstance(self.packed.original, Conv1D) else weight

    def _stack(self, stack: str) -> Tensor:
        original = self.packed.original
        dense = [
            torch.cat(
                [
                    _dense(f"{self.path}.{expert}", part)
                    for part in self.packed.matrices(stack, expert)
                ]
            )
            for expert in range(original.num_experts)
        ]
        return torch.stack([one.T for one in dense] if original.is_transposed else dense)


def _linears(packed: Any) -> Iterator[Any]:
    if isinstance(packed, PackedExperts):
        for stack in packed.leaves:
            for expert in range(packed.original.num_experts):
                yield from packed.matrices(stack, expert)
    else:
        yield packed


def _hook_with_weights(module: Any) -> Any:
    """accelerate's hook that brings the tensors of `module` from elsewhere, if there is one."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False):
            return one
    return None


def _tensors(linear: Any) -> dict[str, Tensor]:
    """The tensors that a packed module holds itself, brought from where they are: those that a
    linear is stored as and its bias, the biases of experts.
    """
    hook, state = _hook_with_weights(linear), linear.state_dict()
    return {
        name: hook.weights_map[name] if hook is not None and tensor.is_meta else tensor.detach()
        for name, tensor in state.items()
        if "." not in name
    }


@torch.no_grad()
def _dense(path: str, linear: Any) -> Tensor:
    """The weight `[out, in]` of a packed linear, as `compress unpack` computes it."""
    stored = {name: t for name, t in _tensors(linear).items() if name.startswith("weight_")}
    try:
        return form_of(linear.entry, stored).dense()
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _plain(held: _Weights, trainable: bool) -> nn.Module:
    """The original of a packed module, with its weights and with what hung on the packed one."""
    packed, original = held.packed, held.packed.original
    for name in held:
        tensor = getattr(original, name).to("meta") if held.elsewhere else held[name]
        setattr(original, name, nn.Parameter(tensor, requires_grad=trainable))
    original.train(packed.training)
    for name, value in vars(packed).items():
        if name.startswith(_HOOKS):
            original.__dict__[name] = value  # the same object: handles that remove a hook find it
    hook = getattr(packed, "_hf_hook", None)
    if held.elsewhere:
        hook = next(filter(None, map(_hook_with_weights, _linears(packed))))
    if hook is not None:
        _hang(hook, original, held)
    return original


def _hang(hook: Any, original: nn.Module, held: _Weights) -> None:
    """Put a copy of accelerate's hook of the packed module on the original one."""
    from accelerate.hooks import add_hook_to_module

    hook = copy.copy(hook)
    if held.elsewhere:
        hook.weights_map, devices = held, set(hook.original_devices.values())
        add_hook_to_module(original, hook)
        hook.original_devices = dict.fromkeys(held, devices.pop())
    else:
        add_hook_to_module(original, hook)

"""Experts whose matrices are stored packed: a module that calls them one by one, in place of
transformers' stacked parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.model import hf_conversion
from compressor.model.experts import (
    Expert,
    Matrix,
    adopt,
    biases,
    entering,
    expert_modules,
    matrices,
    only_stacks,
    run_experts,
    run_sorted_experts,
)

Make = Callable[[str, nn.Module, bool | None], nn.Module]
"""Name of a linear, a plain one of its shape, and whether its family stores it `[in, out]` (None
where it may be either) -> an empty packed one.
"""


class PackedExperts(nn.Module):
    """The experts of one block; `experts.3.up_proj` is the packed `up_proj` of expert 3.

    Args:
        original: the module it takes the place of; kept for its activation, its stacked parameters
            stay empty. Its biases are parameters of this module, under the same names.
        found: the matrices of its stacked parameters.
        packed: the packed linears, by name.
    """

    original: Any

    def __init__(
        self, original: Any, found: Mapping[str, Sequence[Matrix]], packed: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        object.__setattr__(
            self, "original", original
        )  # not a submodule: its parameters are no longer there
        self.leaves = {
            stack: [p.name.rpartition(".")[2] for p in pieces if not p.expert]
            for stack, pieces in found.items()
        }
        self.rows = {
            piece.name.rpartition(".")[2]: piece.rows
            for pieces in found.values()
            for piece in pieces
            if not piece.expert
        }
        for stack in found:  # the block around may initialise them, as Qwen3-Omni's does
            getattr(original, stack)._is_hf_initialized = True
            object.__setattr__(self, stack, getattr(original, stack))
        for name in biases(original):
            self.register_parameter(name, getattr(original, name))
        for expert in range(original.num_experts):
            own = [piece for pieces in found.values() for piece in pieces if piece.expert == expert]
            self.add_module(
                str(expert),
                nn.ModuleDict({piece.name.rpartition(".")[2]: packed[piece.name] for piece in own}),
            )

    def matrices(self, stack: str, expert: int) -> list[Any]:
        """The packed linears that make up one expert's part of the stacked parameter `stack`."""
        return [self.get_submodule(f"{expert}.{leaf}") for leaf in self.leaves[stack]]

    def forward(self, hidden: Tensor, *routed: Tensor) -> Tensor:
        """`[tokens, dim]`, the experts of each token `[tokens, k]` and their weights -> `[tokens,
        dim]`; from adopted experts `[experts * tokens, dim]` -> the same.
        """
        stack, number = entering(self.original), self.original.num_experts
        experts = [
            Expert(self._linears(stack, one), self._linears("down_proj", one)[0])
            for one in range(number)
        ]
        if not routed:
            return run_sorted_experts(self.original, experts, hidden)
        return run_experts(self.original, experts, hidden, *routed)

    def _linears(self, stack: str, expert: int) -> Sequence[Callable[[Tensor], Tensor]]:
        """As `matrices`, each with its bias."""
        packed = self.matrices(stack, expert)
        if not self.original.has_bias:
            return packed
        bias = getattr(self, f"{stack}_bias")[expert]
        rows = [self.rows[leaf] for leaf in self.leaves[stack]]
        return [
            lambda x, linear=linear, own=bias[part]: linear(x) + own
            for linear, part in zip(packed, rows, strict=True)
        ]


def swap_experts(
    model: Any, names: Sequence[str], shared: Mapping[str, str], make: Make
) -> dict[str, str]:
    """Put PackedExperts where packed linears are experts' matrices.

    Args:
        model: on the meta device, before its weights are loaded.
        names: linears that are no modules of `model`.
        shared: those whose dense weights are together in one tensor, by what their path would be:
            that of the module, the number of the expert, the stacked parameter.
        make: of an empty packed linear.

    Returns:
        The name of each linear's module.

    Raises:
        CheckpointError: a name that is none of an expert, or some experts of a block that are
            packed and others that are not.
    """
    sources, order, paths = (
        hf_conversion.sources(model, [f"{name}.weight" for name in names]),
        hf_conversion.order(model),
        {},
    )
    adopt(model)
    for inside, module in expert_modules(model):
        stacks = (entering(module), "down_proj")
        found = {stack: _shared_pieces(inside, module, stack, shared) for stack in stacks}
        turned = None if any(found.values()) else module.is_transposed
        if not any(found.values()):
            if not any(f"{inside}.{stack}" in sources for stack in stacks):
                continue
            found = {
                stack: _pieces(module, stack, sources.get(f"{inside}.{stack}", []), order)
                for stack in stacks
            }
        if not all(found.values()) or not only_stacks(module):
            raise CheckpointError(
                f"config.json lists matrices of {inside} as packed, but not those of all its "
                f"experts"
            )
        packed = {}
        for stack, pieces in found.items():
            stacked = getattr(module, stack)
            columns = stacked.shape[1 if module.is_transposed else 2]
            for piece in pieces:
                rows = piece.rows.stop - piece.rows.start
                plain = nn.Linear(columns, rows, bias=False, device="meta", dtype=stacked.dtype)
                packed[piece.name] = make(piece.name, plain, turned)
                paths[piece.name] = f"{inside}.{piece.expert}.{piece.name.rpartition('.')[2]}"
        parent, _, leaf = inside.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PackedExperts(module, found, packed))
    if unknown := [name for name in (*names, *shared.values()) if name not in paths]:
        saved = model.config.architectures or []
        other = "" if type(model).__name__ in saved else f" (what was saved is {', '.join(saved)})"
        raise CheckpointError(
            f"config.json names the packed linear {unknown[0]!r}, which a {type(model).__name__} "
            f"does not have{other}"
        )
    return paths


def _shared_pieces(inside: str, module: Any, stack: str, shared: Mapping[str, str]) -> list[Matrix]:
    """The matrices of a stacked parameter that is one tensor of a dense checkpoint; none where they
    are not there, or not all of them.
    """
    _, *sides = getattr(module, stack).shape
    rows = slice(0, sides[1 if module.is_transposed else 0])
    names = [shared.get(f"{inside}.{expert}.{stack}", "") for expert in range(module.num_experts)]
    found = [Matrix(name, name, None, expert, rows) for expert, name in enumerate(names) if name]
    return found if len(found) == len(names) else []


def _pieces(
    module: Any, stack: str, tensors: Sequence[tuple[str, str | None]], order: Sequence[str]
) -> list[Matrix]:
    """The matrices that a stacked parameter is made of, equal parts of its rows; none where they
    are not complete.
    """
    number, rows, columns = getattr(module, stack).shape
    parts = len(tensors) // max(1, number)
    if not parts or len(tensors) != parts * number or rows % parts:
        return []
    shapes = {name: (rows // parts, columns) for name, _ in tensors}
    return matrices((number, rows, columns), module.is_transposed, tensors, shapes, order) or []

"""Experts of a mixture (MoE): transformers keeps them as stacked parameters; here each matrix is a
linear of its own.

A block's experts are one module with `gate_up_proj` `[experts, 2 * width, dim]` (or `up_proj`) and
`down_proj`. Its forward is looked up in `ALL_EXPERTS_FUNCTIONS`; ours, below, calls one small
module for each matrix, so that whatever hooks a linear's module (statistics, gradients) sees an
expert's matrix like any other.

Llama 4's experts are no such implementation: they are handed the tokens of each expert one after
another, zeros for those that go elsewhere. `adopt` gives them what the others have.

On disk most families have one tensor for each expert's gate, up and down; a few stack all experts
in one (gpt_oss, which also transposes it and interleaves gate and up, granitemoe, Qwen3-VL-MoE,
Llama 4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

IMPLEMENTATION = "compress-llm"  # the name of our forward among transformers' implementations


class ExpertLinear(nn.Module):
    """One matrix of a stacked parameter of `owner`, as a linear: rows `start:stop` of
    `parameter[expert]`.

    It has no parameters of its own: the stacked ones are looked up when it is called, for they come
        and go with the block.
    """

    owner: Any

    def __init__(self, owner: nn.Module, parameter: str, expert: int, rows: slice) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)  # not registered as a submodule: it is the parent
        self.parameter, self.expert, self.rows = parameter, expert, rows

    @property
    def weight(self) -> Tensor:
        """A view of the matrix as it is stored: `[out, in]`, or `[in, out]` where the family
        transposes it.
        """
        matrix = getattr(self.owner, self.parameter)[self.expert]
        return matrix if self.owner.is_transposed else matrix[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, in]` -> `[tokens, out]`. The bias is added to the rounded product, as
        transformers does for experts.
        """
        y = linear(x, self.weight.T if self.owner.is_transposed else self.weight)
        return (
            y + getattr(self.owner, f"{self.parameter}_bias")[self.expert][self.rows]
            if self.owner.has_bias
            else y
        )


@dataclass(frozen=True)
class Expert:
    """The matrices of one expert: gate and up, or either, or both in one; and down. Each is called
    on `[tokens, in]`.
    """

    enter: Sequence[Callable[[Tensor], Tensor]]
    leave: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matrix:
    """One expert's matrix on disk.

    Attributes:
        name: its tensor's, without `.weight`; where all experts share the tensor, as if they did
            not: `….experts.3.gate_up_proj`.
        tensor: the tensor on disk.
        at: its place along the first dimension of that tensor, None where it is the tensor.
        expert: the number of the expert.
        rows: its rows within the expert's matrix in the stacked parameter.
        turned: on disk it is the other way round than in the stacked parameter.
    """

    name: str
    tensor: str
    at: int | None
    expert: int
    rows: slice
    turned: bool = False


def adopt(model: nn.Module) -> None:
    """Describe the experts of Llama 4 as transformers describes those whose forward is one of its
    implementations, and have them compute with their `experts` once they got them (see `attach`).
    """
    for module in model.modules():
        if type(module).__name__ == "Llama4TextExperts":
            module.__dict__ |= {
                "has_gate": True,
                "has_bias": False,
                "is_transposed": True,
                "_apply_gate": partial(_gated, module),
                "forward": partial(_sorted_forward, module),
            }


def _gated(module: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * module.act_fn(gate)


def _sorted_forward(module: Any, hidden: Tensor) -> Tensor:
    own = module.__dict__
    if "experts" not in own:
        return type(module).forward(module, hidden)
    return run_sorted_experts(
        module, own["experts"], hidden, everything=own.get("everything", False)
    )


def expert_modules(root: nn.Module) -> list[tuple[str, Any]]:
    """Modules below `root` whose forward is one of transformers' expert implementations, or that
    were adopted, by name.
    """
    found = [
        (name, module) for name, module in root.named_modules() if hasattr(module, "_apply_gate")
    ]
    return [
        (name, module)
        for name, module in found
        if isinstance(getattr(module, "num_experts", None), int) and hasattr(module, "has_gate")
    ]


def entering(module: Any) -> str:
    """The name of the stacked parameter that the tokens enter."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def only_stacks(module: Any) -> bool:
    """Whether an experts' module holds nothing but its two stacked parameters and their biases: no
    norm.
    """
    stacks = {entering(module), "down_proj"}
    held = {name for name, _ in module.named_parameters()}
    return held == stacks | set(biases(module)) and not list(module.buffers())


def biases(module: Any) -> list[str]:
    """Names of the parameters that hold the biases of an experts' module, `[experts, out]` each."""
    return [f"{entering(module)}_bias", "down_proj_bias"] if module.has_bias else []


def matrices(
    shape: Sequence[int],
    transposed: bool,
    tensors: Sequence[tuple[str, str | None]],
    shapes: Mapping[str, Sequence[int]],
    order: Sequence[str],
    parameter: str = "",
) -> list[Matrix] | None:
    """How a stacked parameter is made of tensors on disk; None where that is not understood.

    Args:
        shape: of the parameter, `[experts, rows, columns]`.
        transposed: the family stores `[in, out]`.
        tensors: names on disk and, for each, the pattern of the conversion that it matched, if any.
        shapes: of the tensors on disk.
        order: the patterns of that conversion; it concatenates in this order.
        parameter: its name, such as `model.layers.0.mlp.experts.gate_up_proj`.
    """
    experts, rows, columns = shape
    if len(tensors) == 1:
        name = tensors[0][0]
        turned = tuple(shapes[name]) != tuple(shape)
        whole = tuple(shapes[name]) == ((experts, columns, rows) if turned else tuple(shape))
        whole = whole and not (turned and tensors[0][1] is None)
        return (
            [
                Matrix(
                    _name_of(expert, name.removesuffix(".weight"), parameter),
                    name,
                    expert,
                    expert,
                    slice(0, columns if transposed else rows),
                    turned,
                )
                for expert in range(experts)
            ]
            if whole
            else None
        )
    numbered: dict[int, list[tuple[int, str]]] = {}
    for name, pattern in tensors:
        match = re.fullmatch(r".+\.(\d+)\.[^.]+\.weight", name)
        if not match or pattern not in order or transposed:
            return None
        numbered.setdefault(int(match[1]), []).append((order.index(pattern), name))
    found: list[Matrix] = []
    for expert, parts in sorted(numbered.items()):
        start = 0
        for _, name in sorted(parts):
            if len(shapes[name]) != 2 or shapes[name][1] != columns:
                return None
            found.append(
                Matrix(
                    name.removesuffix(".weight"),
                    name,
                    None,
                    expert,
                    slice(start, start + shapes[name][0]),
                )
            )
            start += shapes[name][0]
        if start != rows:
            return None
    return found if sorted(numbered) == list(range(experts)) else None


def _name_of(expert: int, base: str, parameter: str) -> str:
    """The name of an expert's matrix in the tensor `base` of all experts: as where each has its
    own, in the module that `parameter` belongs to, under the names on disk of what is around it.
    """
    *_, around, module, stack = ["", "", *parameter.split(".")]
    head, found, _ = base.rpartition(f".{around}.")
    return f"{head}{found}{module}.{expert}.{stack}" if around and found else f"{base}.{expert}"


def run_experts(
    module: Any,
    experts: Sequence[Expert],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    everything: bool = False,
) -> Tensor:
    """What transformers' implementations compute, matrix by matrix.

    Args:
        module: the experts' module; its activation and gate are used.
        experts: its matrices.
        hidden: `[tokens, dim]`.
        index, weights: `[tokens, k]`, the experts each token is sent to and their weights.
        everything: call each expert on all tokens; what the router did not send there is dropped
            from the result.

    Returns:
        `[tokens, dim]` in the dtype of `hidden`. The weighted parts are summed over k, not added up
        expert by expert.
    """
    parts: Tensor | None = None
    for number, expert in enumerate(experts):
        token, slot = torch.where(index == number)
        if not len(token) and not everything:
            continue
        x = hidden if everything else hidden[token]
        entered = [enter(x) for enter in expert.enter]
        inner = entered[0] if len(entered) == 1 else torch.cat(entered, dim=-1)
        y = expert.leave(module._apply_gate(inner) if module.has_gate else module.act_fn(inner))
        if getattr(module, "has_post_expert_norm", False):  # there from transformers 5.20 on
            y = module.post_expert_norm(y)
        weighted = (y[token] if everything else y) * weights[token, slot, None]
        if parts is None:
            parts = torch.zeros(
                *index.shape, hidden.shape[-1], dtype=weighted.dtype, device=hidden.device
            )
        parts[token, slot] = weighted
    return torch.zeros_like(hidden) if parts is None else parts.sum(dim=1).to(hidden.dtype)


def run_sorted_experts(
    module: Any, experts: Sequence[Expert], hidden: Tensor, *, everything: bool = False
) -> Tensor:
    """As `run_experts`, for experts that are handed their tokens one expert after another.

    Args:
        module: the experts' module; its gate is used.
        experts: its matrices, without biases.
        hidden: `[experts * tokens, dim]`, each token times its weight, zeros for an expert that the
            router did not send it to; those are not computed, for they give zeros.
        everything: compute them all the same.

    Returns:
        Of the shape and dtype of `hidden`.
    """
    parts = []
    for expert, x in zip(experts, hidden.view(len(experts), -1, hidden.shape[-1]), strict=True):
        sent = x.new_ones(len(x), dtype=torch.bool) if everything else x.any(dim=-1)
        y = torch.zeros_like(x)
        if sent.any():
            entered = torch.cat([enter(x[sent]) for enter in expert.enter], dim=-1)
            y[sent] = expert.leave(module._apply_gate(entered))
        parts.append(y)
    return torch.cat(parts)


def use_linears(model: Any) -> None:
    """Have every experts module of `model` that got its `experts` (see `attach`) compute with
    them.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if "experts" not in module.__dict__:
            return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, index, weights)
        return run_experts(
            module,
            module.experts,
            hidden,
            index,
            weights,
            everything=module.__dict__.get("everything", False),
        )

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    model.set_experts_implementation(IMPLEMENTATION)


def attach(module: Any, found: Mapping[str, Sequence[Matrix]]) -> dict[str, ExpertLinear]:
    """Give an experts module its matrices as linears, by name.

    Args:
        module: the experts' module.
        found: the matrices of its two stacked parameters, by parameter.
    """
    made: dict[str, dict[int, list[ExpertLinear]]] = {}
    named: dict[str, ExpertLinear] = {}
    for parameter, pieces in found.items():
        for piece in pieces:
            named[piece.name] = ExpertLinear(module, parameter, piece.expert, piece.rows)
            made.setdefault(parameter, {}).setdefault(piece.expert, []).append(named[piece.name])
    enter, leave = made[entering(module)], made["down_proj"]
    module.__dict__["experts"] = [
        Expert(enter[number], leave[number][0]) for number in range(module.num_experts)
    ]
    return named


def stacked(parts: Sequence[tuple[ExpertLinear, Tensor]]) -> Tensor:
    """A stacked parameter with these matrices, as they are stored, in place of its own;
    differentiable in them.
    """
    module, weight = parts[0]
    base = getattr(module.owner, module.parameter).detach().to(weight.dtype)
    experts = []
    for number, own in enumerate(base):
        pieces, row = [], 0
        for start, matrix in sorted(
            ((m.rows.start, w) for m, w in parts if m.expert == number), key=lambda part: part[0]
        ):
            pieces += [own[row:start], matrix]
            row = start + len(matrix)
        experts.append(torch.cat([*pieces, own[row:]]))
    return torch.stack(experts)


@contextmanager
def seeing_all_tokens(block: nn.Module) -> Iterator[None]:
    """Inside the `with`, every expert of `block` is called on all tokens; what the block returns
    stays the same.
    """
    modules = [module for _, module in expert_modules(block)]
    for module in modules:
        module.__dict__["everything"] = True
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["everything"]

"""A model that is never in memory whole: a skeleton on the meta device, loaded and freed one
decoder block at a time.

Names and layouts on disk are turned into the modules' by `conversion`; the matrices of stacked
experts are linears by `experts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError, NumericalError
from compressor.model import heap, hf_conversion
from compressor.model.architecture import check_sizes, load_config
from compressor.model.experts import (
    adopt,
    attach,
    entering,
    expert_modules,
    matrices,
    use_linears,
)
from compressor.model.language_model import decoder_blocks, is_wrapper, on_meta, text_path
from compressor.model.linear import (
    CONVOLUTION,
    ROUTER,
    WEIGHT_DTYPES,
    Linear,
    Other,
    computes_as_linear,
    never_compressed,
    own_linear,
)
from compressor.stats import all_finite


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericalError naming `name` where the tensor holds NaN or Inf."""
    if not all_finite(tensor):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        raise NumericalError(
            f"{name} holds {kind} as {str(tensor.dtype).removeprefix('torch.')}; nothing was "
            f"written"
        )


class Skeleton:
    """The model of `reader`'s checkpoint with every parameter on the meta device.

    Attributes:
        model: the transformers model, in eval mode.
        blocks: its decoder blocks; `path` is their name, such as `model.layers`.
        dtype: what blocks are loaded and computed in.
        is_wrapper: the model is multimodal; its text model's blocks are the blocks.
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        CheckpointError: an architecture transformers does not know, no decoder stack, or tensors
            that do not fit it.
    """

    def __init__(
        self, reader: Reader, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
    ) -> None:
        heap.keep_freed()
        self.reader = reader
        self.trust_remote_code = trust_remote_code
        self.config = load_config(reader, trust_remote_code=trust_remote_code)
        self.dtype = dtype or _stored_dtype(reader)
        check_sizes(reader, self.config)
        architectures = reader.config.get("architectures")
        self.model = on_meta(self.config, self.dtype, trust_remote_code, architectures or ())
        adopt(self.model)
        self.path, self.blocks = decoder_blocks(self.model, self.config)
        self.is_wrapper = is_wrapper(self.model)
        self._text = text_path(self.model) if self.is_wrapper else ""
        self.sources = hf_conversion.sources(self.model, reader.tensors)
        self.on_disk = {
            parameter: [name for name, _ in found] for parameter, found in self.sources.items()
        }
        self._check_tensors()
        self._order = hf_conversion.order(self.model)
        self._reordering = hf_conversion.reordering(self.model)
        shapes = {name: entry.shape for name, entry in reader.tensors.items()}
        self._experts = [self._find_experts(index, shapes) for index in range(len(self.blocks))]
        if any(self._experts):
            use_linears(self.model)

    def in_dtype(self, dtype: torch.dtype) -> Skeleton:
        """A skeleton of the same checkpoint that computes in `dtype`; this one, if it does."""
        return (
            self
            if self.dtype == dtype
            else Skeleton(self.reader, dtype=dtype, trust_remote_code=self.trust_remote_code)
        )

    def _check_tensors(self) -> None:
        """Raise CheckpointError unless the tensors on disk are those of this model."""
        state, kind = self.model.state_dict(), self.config.model_type
        for parameter, found in self.sources.items():
            for name, pattern in found:
                shape = self.reader.tensors[name].shape
                if (
                    pattern is None
                    and parameter in state
                    and tuple(state[parameter].shape) != shape
                ):
                    expected = (
                        f"a {kind} model with this config.json has {list(state[parameter].shape)}"
                    )
                    raise CheckpointError(
                        f"{self.reader.folder}: {name} has shape {list(shape)}, {expected}"
                    )
        configs = (self.config, self.config.get_text_config())
        ties = any(getattr(config, "tie_word_embeddings", False) for config in configs)
        tied = set(getattr(self.model, "_tied_weights_keys", None) or {}) if ties else set()
        tied |= set(getattr(self.model, "all_tied_weights_keys", None) or {})
        made = hf_conversion.targets(self.model, self.reader.tensors)
        missing = sorted(
            name for name, _ in self.model.named_parameters() if name not in made | tied
        )
        if missing:
            raise CheckpointError(
                f"{self.reader.folder} lacks {len(missing)} tensors of a {kind} model, "
                f"{missing[0]} among them"
            )

    def _find_experts(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> list[Linear]:
        """The experts' matrices of block `index`, found among the tensors on disk, whose `shapes`
        go by name; none where their layout is not understood.
        """
        linears = []
        for local, module in expert_modules(self.blocks[index]):
            full, stacks = f"{self.path}.{index}.{local}", (entering(module), "down_proj")
            found = {}
            for stack in stacks:
                shape, tensors = (
                    tuple(getattr(module, stack).shape),
                    self.sources.get(f"{full}.{stack}", []),
                )
                ordered = not self._reordering & {pattern for _, pattern in tensors}
                found[stack] = ordered and matrices(
                    shape, module.is_transposed, tensors, shapes, self._order, f"{full}.{stack}"
                )
            if all(found.values()):
                named = attach(module, found)
                places = [place for stack in stacks for place in found[stack]]
                turned = module.is_transposed
                linears += [
                    Linear(p.name, p.tensor, named[p.name], turned, p.at, full, p.turned)
                    for p in places
                ]
        return linears

    def _load(self, parameters: Iterable[str]) -> None:
        names = [name for parameter in parameters for name in self.on_disk[parameter]]
        with self.reader.opened() as lazy:
            try:
                hf_conversion.load(self.model, {name: lazy(name) for name in names}, self.dtype)
            except CheckpointError as error:
                raise CheckpointError(f"{self.reader.folder}: {error}") from None

    def load_block(self, index: int, device: torch.device) -> nn.Module:
        """Block `index` with its weights, on `device`. Raises NumericalError for a weight that is
        not finite.
        """
        prefix = f"{self.path}.{index}."
        self._load(name for name in self.on_disk if name.startswith(prefix))
        for name, tensor in self.blocks[index].named_parameters():
            require_finite(prefix + name, tensor)
        # that the layout was understood shows on one matrix of each stack as well as on all
        for linear in {linear.parameter: linear for linear in self._experts[index]}.values():
            if not torch.equal(linear.get(), linear.read(self.reader).to(self.dtype)):
                raise CheckpointError(
                    f"{linear.name} is not where it was expected in {linear.experts}; leave its "
                    f"experts dense"
                )
        heap.give_back()  # what their way from the file has left
        return self.blocks[index].to(device)

    def free_block(self, index: int) -> None:
        """Return the memory of a block."""
        _parameters_to_meta(self.blocks[index], lambda name: True)
        heap.give_back()

    def load_embeddings(self, device: torch.device, *, head: bool = False) -> nn.Module:
        """The decoder without its blocks (embeddings, rotary tables, final norm), on `device`.

        With `head` the whole model without its blocks: the language head too.
        """
        inner = self.model if head else self.model.base_model
        prefix = f"{self.model.base_model_prefix}." if inner is not self.model else ""
        tied = self.model.named_parameters(remove_duplicate=False)  # by either of its names
        known = {name for name, _ in tied} | {name for name, _ in self.model.named_buffers()}
        wanted = [
            name
            for name in self.on_disk
            if name in known
            and name.startswith(prefix)
            and not name.startswith(f"{self.path}.")
            and self._is_text(name)
        ]
        self._load(wanted)
        for name, module in inner.named_modules():
            full = prefix + name
            if (
                full != self.path
                and not full.startswith(f"{self.path}.")
                and not self.path.startswith(f"{full}.")
                and name
                and self._is_text(f"{full}.")
            ):
                module.to(device)
        if self.is_wrapper:
            self._stand_in(device)
        return inner

    def _stand_in(self, device: torch.device) -> None:
        """Give the modules around the text model a first parameter on `device`: that is where some
        move their embeddings. It takes no memory, and is NaN, should anything compute with it.
        """
        parts = self._text.split(".")
        for depth in range(len(parts)):
            around = self.model.get_submodule(".".join(parts[:depth]))
            name, first = next(around.named_parameters())
            if first.device.type == "meta" and first.is_floating_point():
                owner, _, leaf = name.rpartition(".")
                empty = torch.full((), math.nan, dtype=first.dtype, device=device)
                standing = nn.Parameter(empty.expand(first.shape), requires_grad=False)
                setattr(around.get_submodule(owner), leaf, standing)

    def _is_text(self, name: str) -> bool:
        """Whether text needs a parameter: in a wrapper, of the text model or beside the body."""
        if not self.is_wrapper:
            return True
        body = f"{self.model.base_model_prefix}."
        return name.startswith(f"{self._text}.") or (body != "." and not name.startswith(body))

    @property
    def notes(self) -> list[str]:
        """What a user should know about how it is compressed."""
        if not self.is_wrapper:
            return []
        return [
            f"{type(self.model).__name__} is multimodal: the blocks of its text model "
            f"({self.path}) are compressed, calibrated on text alone; everything else is copied"
        ]

    def free_embeddings(self) -> None:
        """Return the memory of everything outside the blocks; rotary tables and other small buffers
        stay.
        """
        _parameters_to_meta(self.model, lambda name: not name.startswith(f"{self.path}."))
        heap.give_back()

    def linears(self, index: int) -> list[Linear]:
        """The weight matrices of block `index`: of modules that compute y = W x + b, as nn.Linear
        and Conv1D do, and of experts. No routers.
        """
        from transformers.pytorch_utils import Conv1D

        found, routers = [], self._routers(index)
        for name, module in self.blocks[index].named_modules():
            if computes_as_linear(module) and not never_compressed(name):
                full = f"{self.path}.{index}.{name}"
                if self._is_alone(f"{full}.weight") and f"{name}.weight" not in routers:
                    tensor = self.on_disk[f"{full}.weight"][0]
                    found.append(own_linear(full, tensor, module, isinstance(module, Conv1D)))
        return found + self._experts[index]

    def _is_alone(self, parameter: str) -> bool:
        """Whether a parameter is a tensor on disk as it is, and not part of one or made of one."""
        return [pattern for _, pattern in self.sources.get(parameter, [])] == [None]

    def _routers(self, index: int) -> set[str]:
        """Names within the block of the matrices beside experts that choose or weigh them: a row
        for each expert, or one row.
        """
        block, found = self.blocks[index], set()
        for inside, experts in expert_modules(block):
            beside = inside.rpartition(".")[0]
            for name, parameter in block.get_submodule(beside).named_parameters(beside):
                if (
                    parameter.dim() == 2
                    and len(parameter) in (1, experts.num_experts)
                    and not name.startswith(f"{inside}.")
                ):
                    found.add(name)
        return found

    def others(self, index: int) -> list[Other]:
        """Parameters of block `index` with two dimensions or more that are no weight of
        `linears(index)`.
        """
        ours = {linear.parameter for linear in self.linears(index)}
        routers, found = self._routers(index), []
        for name, parameter in self.blocks[index].named_parameters():
            full, shape = f"{self.path}.{index}.{name}", tuple(parameter.shape)
            if len(shape) > 1 and full not in ours:
                reason = ROUTER if name in routers else self._why_not_linear(index, name)
                found.append(Other(*self._named(full), shape, reason))
        return found

    def _why_not_linear(self, index: int, name: str) -> str:
        """What the parameter `name` of a block is, that is none of its linears."""
        block, owner = self.blocks[index], name.rpartition(".")[0]
        module = block.get_submodule(owner)
        if reason := never_compressed(owner):
            return reason
        experts = tuple(f"{inside}." for inside, _ in expert_modules(block))
        if name.endswith("_bias") and name.startswith(experts):
            return "biases of experts"
        if computes_as_linear(module):
            made = len(self.on_disk.get(f"{self.path}.{index}.{name}", [])) > 1
            return "made of several tensors on disk" if made else "stored in another layout"
        if isinstance(module, nn.Linear):
            return "a linear layer with a computation of its own"
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return CONVOLUTION
        return "not a linear layer"

    def stored_as(self, other: Other) -> list[tuple[str, list[int]]]:
        """Name and shape of each matrix on disk that a parameter is made of."""
        tensors = self.on_disk.get(other.parameter, [])
        if len(tensors) < 2:
            return [(other.name, list(other.shape))]
        shapes = {tensor: list(self.reader.tensors[tensor].shape) for tensor in tensors}
        return [(tensor, shape) for tensor, shape in shapes.items() if len(shape) > 1]

    def _named(self, parameter: str) -> tuple[str, str]:
        """The name on disk of a parameter that is a tensor there, and that of the parameter."""
        tensors = self.on_disk.get(parameter, [])
        return (tensors[0] if len(tensors) == 1 else parameter), parameter


def _parameters_to_meta(module: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Buffers stay: they are small, and those that are not on disk could not be loaded again."""
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if chosen(name) and parameter.device.type != "meta":
            parent, _, leaf = name.rpartition(".")
            setattr(
                module.get_submodule(parent),
                leaf,
                nn.Parameter(parameter.to("meta"), requires_grad=False),
            )


def _stored_dtype(reader: Reader) -> torch.dtype:
    """The float dtype most bytes of the checkpoint are stored in."""
    volume: dict[str, int] = {}
    for entry in reader.tensors.values():
        volume[entry.dtype] = volume.get(entry.dtype, 0) + entry.nbytes
    most = max(volume, key=lambda dtype: volume[dtype], default="")
    if most not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{reader.folder} stores its weights as {most or 'nothing'}; float32, float16 and "
            f"bfloat16 are supported"
        )
    return WEIGHT_DTYPES[most]

"""A model that is never in memory whole: a skeleton on the meta device, loaded and freed one decoder block at a time.

Names and layouts on disk are turned into the modules' by transformers' own conversion machinery, applied to a subset of
the tensors. That machinery is not a documented interface: pyproject.toml declares the range of versions it was tested with.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint import Reader
from compressor.errors import CheckpointError, NumericalError

WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block.

    Attributes:
        name: of the module, such as `model.layers.0.self_attn.q_proj`.
        tensor: its weight's name on disk.
        module: the module that computes with it.
        transposed: the stored weight is `[in, out]` (gpt2's Conv1D).
    """

    name: str
    tensor: str
    module: Any  # nn.Linear or Conv1D
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def size(self) -> int:
        """Its number of weights."""
        return self.module.weight.numel()

    def read(self, reader: Reader) -> Tensor:
        """The weight `[out, in]` in its dtype on disk."""
        weight = reader.read(self.tensor)
        return weight.T.contiguous() if self.transposed else weight

    def get(self) -> Tensor:
        """The weight `[out, in]` it computes with now."""
        weight = self.module.weight.detach()
        return weight.T.contiguous() if self.transposed else weight

    @torch.no_grad()
    def set(self, weight: Tensor) -> None:
        """Compute with `weight` `[out, in]` from now on."""
        parameter = self.module.weight
        parameter.copy_(weight.T if self.transposed else weight)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericalError naming `name` where the tensor holds NaN or Inf."""
    low, high = tensor.aminmax()  # both are NaN if any value is; reads the tensor once and makes no mask
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        kind = "NaN" if bool(torch.isnan(low)) else "Inf"
        raise NumericalError(f"{name} holds {kind} as {str(tensor.dtype).removeprefix('torch.')}; nothing was written")


class Skeleton:
    """The model of `reader`'s checkpoint with every parameter on the meta device.

    Attributes:
        model: the transformers model, in eval mode.
        blocks: its decoder blocks; `path` is their name, such as `model.layers`.
        dtype: what blocks are loaded and computed in.
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        CheckpointError: an architecture transformers does not know, no decoder stack, or tensors that do not fit it.
    """

    def __init__(self, reader: Reader, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> None:
        _return_large_allocations()
        self.reader = reader
        self.trust_remote_code = trust_remote_code
        self.config = load_config(reader, trust_remote_code=trust_remote_code)
        self.dtype = dtype or _stored_dtype(reader)
        depth = getattr(self.config.get_text_config(decoder=True), "num_hidden_layers", 0)
        if not isinstance(depth, int) or depth > len(reader.tensors):
            raise CheckpointError(f"{reader.folder}: config.json has {depth} layers, the checkpoint {len(reader.tensors)} tensors")
        self.model = _on_meta(self.config, self.dtype, trust_remote_code)
        self.path, self.blocks = _decoder_blocks(self.model, self.config)
        self.on_disk = self._names_on_disk()

    def in_dtype(self, dtype: torch.dtype) -> Skeleton:
        """A skeleton of the same checkpoint that computes in `dtype`; this one, if it does."""
        return self if self.dtype == dtype else Skeleton(self.reader, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def _names_on_disk(self) -> dict[str, list[str]]:
        """Parameter name -> the tensors on disk it is made from."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        converters = [step for step in mapping if isinstance(step, WeightConverter)]
        state = self.model.state_dict()
        found: dict[str, list[str]] = {}
        for name, entry in self.reader.tensors.items():
            target, converter = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            target = name if target not in state and name in state else target
            found.setdefault(target, []).append(name)
            if converter is None and target in state and tuple(state[target].shape) != entry.shape:
                expected = f"a {self.config.model_type} model with this config.json has {list(state[target].shape)}"
                raise CheckpointError(f"{self.reader.folder}: {name} has shape {list(entry.shape)}, {expected}")
        tied = (
            set(getattr(self.model, "_tied_weights_keys", None) or {})
            if self.config.get_text_config().tie_word_embeddings
            else set()
        )
        missing = sorted(name for name, _ in self.model.named_parameters() if name not in found and name not in tied)
        if missing:
            raise CheckpointError(
                f"{self.reader.folder} lacks {len(missing)} tensors of a {self.config.model_type} model, {missing[0]} among them"
            )
        return found

    def _load(self, parameters: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = [name for parameter in parameters for name in self.on_disk[parameter]]
        mapping: Any = get_model_conversion_mapping(self.model)
        with self.reader.opened() as lazy, _quiet():
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                {name: lazy(name) for name in names},
                LoadStateDictConfig(device_map={"": "cpu"}, dtype=self.dtype, weight_mapping=mapping),
                disk_offload_index=None,
            )
        for what, found in (("does not fit", info.mismatched_keys), ("cannot be converted", info.conversion_errors)):
            if found:
                raise CheckpointError(
                    f"{self.reader.folder}: {str(next(iter(found)))[:200]} {what} the {self.config.model_type} model of config.json"
                )
        self.model.tie_weights()  # parameters were replaced, so ties made earlier are gone

    def load_block(self, index: int, device: torch.device) -> nn.Module:
        """Block `index` with its weights, on `device`. Raises NumericalError for a weight that is not finite."""
        prefix = f"{self.path}.{index}."
        self._load(name for name in self.on_disk if name.startswith(prefix))
        for name, tensor in self.blocks[index].named_parameters():
            require_finite(prefix + name, tensor)
        return self.blocks[index].to(device)

    def free_block(self, index: int) -> None:
        """Return the memory of a block."""
        _parameters_to_meta(self.blocks[index], lambda name: True)

    def load_embeddings(self, device: torch.device, *, head: bool = False) -> nn.Module:
        """The decoder without its blocks (embeddings, rotary tables, final norm), on `device`.

        With `head` the whole model without its blocks: the language head too.
        """
        inner = self.model if head else self.model.base_model
        prefix = f"{self.model.base_model_prefix}." if inner is not self.model else ""
        known = {name for name, _ in self.model.named_parameters()} | {name for name, _ in self.model.named_buffers()}
        wanted = [
            name for name in self.on_disk if name in known and name.startswith(prefix) and not name.startswith(f"{self.path}.")
        ]
        self._load(wanted)
        for name, module in inner.named_modules():
            full = prefix + name
            if full != self.path and not full.startswith(f"{self.path}.") and not self.path.startswith(f"{full}.") and name:
                module.to(device)
        return inner

    def free_embeddings(self) -> None:
        """Return the memory of everything outside the blocks; rotary tables and other small buffers stay."""
        _parameters_to_meta(self.model, lambda name: not name.startswith(f"{self.path}."))

    def linears(self, index: int) -> list[Linear]:
        """The weight matrices of block `index`: nn.Linear (and its subclasses) and Conv1D."""
        from transformers.pytorch_utils import Conv1D

        found = []
        for name, module in self.blocks[index].named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                full = f"{self.path}.{index}.{name}"
                tensors = self.on_disk.get(f"{full}.weight", [])
                if len(tensors) == 1:
                    found.append(Linear(full, tensors[0], module, isinstance(module, Conv1D)))
        return found

    def others(self, index: int) -> list[tuple[str, tuple[int, ...]]]:
        """Parameters of block `index` with two dimensions or more that are no weight of `linears(index)`."""
        ours = {f"{linear.name}.weight" for linear in self.linears(index)}
        prefix = f"{self.path}.{index}."
        named = ((prefix + name, tuple(parameter.shape)) for name, parameter in self.blocks[index].named_parameters())
        return [(name, shape) for name, shape in named if len(shape) >= 2 and name not in ours]


def _parameters_to_meta(module: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Buffers stay: they are small, and those that are not on disk could not be loaded again."""
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if chosen(name) and parameter.device.type != "meta":
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _return_large_allocations() -> None:
    """Have glibc give every freed tensor back to the system at once.

    By default its threshold for that grows to 32 MB, and tensors below it leave a fragmented heap: a 1.1B model then takes
    55 MB more with each block.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers' own for each block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_config(reader: Reader, *, trust_remote_code: bool) -> Any:
    """The transformers config of a checkpoint that is not compressed yet. Raises CheckpointError."""
    from transformers import AutoConfig

    kind = reader.config.get("model_type")
    if reader.config.get("quantization_config"):
        described = reader.config["quantization_config"]
        method = described.get("quant_method") if isinstance(described, dict) else described
        raise CheckpointError(f"{reader.folder} is quantised or compressed already ({method}); give the original checkpoint")
    try:
        return AutoConfig.from_pretrained(reader.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class raises on values it does not take
        import transformers

        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{reader.folder} needs Python code that it brings along; add --trust-remote-code if you trust it"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{reader.folder}: architecture {kind!r} cannot be used with transformers {transformers.__version__}: {reason}"
        ) from None


def _on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"architecture {config.model_type!r} is no causal language model that can be built: {reason}"
        ) from None
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _decoder_blocks(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList as long as the config has layers; true of every decoder family tried."""
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise CheckpointError(f"architecture {config.model_type!r} has no stack of {depth} decoder blocks that could be found")
    return min(lists, key=lambda item: item[0].count("."))


def _stored_dtype(reader: Reader) -> torch.dtype:
    """The float dtype most bytes of the checkpoint are stored in."""
    volume: dict[str, int] = {}
    for entry in reader.tensors.values():
        volume[entry.dtype] = volume.get(entry.dtype, 0) + entry.nbytes
    most = max(volume, key=lambda dtype: volume[dtype], default="")
    if most not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{reader.folder} stores its weights as {most or 'nothing'}; float32, float16 and bfloat16 are supported"
        )
    return WEIGHT_DTYPES[most]

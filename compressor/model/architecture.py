"""What config.json says of a model: its transformers config, its sizes held against the tensors,
the model of it without memory, and where its decoder blocks are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compressor.checkpoint.dequantised import DequantisedReader, described_quantisation
from compressor.checkpoint.packed_config import QUANT_METHOD
from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError

_SIZE = re.compile(
    "size|dim|head|layer|expert|rank|width|channel|embd|inner|d_model|group"
)  # in keys of config.json
_LENGTH = re.compile(
    "chunk|window|image|patch|audio"
)  # in keys that measure the input, not the model
_MOST_POSITIONS = 1 << 24  # that any model was made for; some families keep a table of them


def load_config(reader: Reader, *, trust_remote_code: bool) -> Any:
    """The transformers config of a checkpoint that is not compressed yet. Raises
    CheckpointError.
    """
    from transformers import AutoConfig

    kind = reader.config.get("model_type")
    described = described_quantisation(reader.config) or reader.config.get("quantization_config")
    if described:
        raise CheckpointError(f"{reader.folder} {_why_not_dense(described)}")
    try:
        config = AutoConfig.from_pretrained(reader.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class raises on values it does not take
        import transformers

        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{reader.folder} needs Python code that it brings along; add `trust_remote_code` "
                f"if you trust it"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{reader.folder}: architecture {kind!r} cannot be used with transformers "
            f"{transformers.__version__}: {reason}"
        ) from None
    for part in (config, config.get_text_config()):
        if isinstance(part.dtype, torch.dtype) and not part.dtype.is_floating_point:
            raise CheckpointError(
                f"{reader.folder}/config.json has dtype {str(part.dtype).removeprefix('torch.')}, "
                f"in which no model computes: write that of its weights, such as bfloat16"
            )
    if isinstance(reader, DequantisedReader):
        for part in (config, config.get_text_config()):
            vars(part).pop("quantization_config", None)
            part.dtype = torch.bfloat16
    return config


def _why_not_dense(described: Any) -> str:
    """Why a checkpoint with this `quantization_config` cannot be compressed, and what to do."""
    method = described.get("quant_method") if isinstance(described, Mapping) else described
    if method == QUANT_METHOD:
        return (
            f"is quantised or compressed already ({method}); give the original checkpoint, or "
            f"`compress unpack` it first"
        )
    return (
        f"is quantised or compressed already ({method}); block FP8 (fp8) and MXFP4 are read, of "
        f"other forms give the original checkpoint, in bfloat16, float16 or float32"
    )


def on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The causal language model of a transformers config, in eval mode, its parameters on the meta
    device. Raises CheckpointError.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"architecture {config.model_type!r} is no causal language model that can be built: "
            f"{reason}"
        ) from None
    model.tie_weights()
    return model.eval().requires_grad_(False)


def decoder_blocks(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList as long as the config has layers; true of every decoder family
    tried.
    """
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise CheckpointError(
            f"architecture {config.model_type!r} has no stack of {depth} decoder blocks that could "
            f"be found"
        )
    return min(lists, key=lambda item: item[0].count("."))


def check_sizes(reader: Reader, config: Any) -> None:
    """Refuse a transformers config of a model that cannot be the checkpoint's, before it is built
    and takes the memory.

    Args:
        reader: the checkpoint.
        config: made from its config.json, for the number of layers goes by many names there.

    Raises:
        CheckpointError: more layers than tensors, or a size or count far beyond every dimension of
            every tensor.
    """
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(depth, int) or depth > len(reader.tensors):
        raise CheckpointError(
            f"{reader.folder}: config.json has {depth} layers, the checkpoint "
            f"{len(reader.tensors)} tensors"
        )
    largest = max((size for entry in reader.tensors.values() for size in entry.shape), default=0)
    for key, value in _numbers(reader.config):
        if "position" in key:
            most = _MOST_POSITIONS
        else:
            most = (
                max(4096, 4 * largest)
                if _SIZE.search(key) and not _LENGTH.search(key)
                else math.inf
            )
        if value > most:
            raise CheckpointError(
                f"{reader.folder}: config.json has {key} {value}; no tensor has a dimension above "
                f"{largest}"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a JSON document, each with the nearest key above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float):
        yield key, value

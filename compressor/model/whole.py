"""A checkpoint that was published quantised as a whole transformers model, dense: what it is
compared with.

Transformers dequantises too, but not where a side of a weight is no multiple of its blocks, as
every DeepSeek has one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from compressor.checkpoint.dequantised import DequantisedReader
from compressor.model.architecture import load_config
from compressor.model.language_model import on_meta


def load_dequantised(reader: DequantisedReader, **options: Any) -> Any:
    """The causal language model of `reader`'s checkpoint with its dense weights.

    Args:
        reader: the checkpoint.
        options: for the `from_pretrained` of its class.

    Raises:
        CheckpointError: an architecture that transformers does not know, or a scale that is no
            number.
    """
    from transformers import GenerationConfig

    code = options.get("trust_remote_code", False)
    config = load_config(reader, trust_remote_code=code)
    kind = type(on_meta(config, torch.bfloat16, code))
    reader.check_scales()
    with reader.opened() as lazy:
        tensors: Any = {name: lazy(name) for name in reader.tensors}
        loaded = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    with suppress(OSError):  # there need not be any
        model.generation_config = GenerationConfig.from_pretrained(reader.folder)
    return loaded

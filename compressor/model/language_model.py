"""Which transformers model a config is of, whether it is one that is compressed, and where its
decoder blocks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.errors import CheckpointError


def on_meta(
    config: Any, dtype: torch.dtype, trust_remote_code: bool, architectures: Sequence[str] = ()
) -> Any:
    """The language model of a transformers config, in eval mode, its parameters on the meta device.

    Args:
        config: of the checkpoint.
        dtype: of its parameters.
        trust_remote_code: whether Python code of the checkpoint may run.
        architectures: the classes that config.json names. A multimodal one among them is what is
            built, its text model in it; otherwise the causal language model of the config.

    Raises:
        CheckpointError: there is none, or it is an encoder or an encoder-decoder.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    _refuse_encoder_decoder(config)
    kind = wrapper_class(config, architectures) or named_class(config, architectures)
    try:
        with init_empty_weights(include_buffers=False):
            if kind:
                model = kind._from_config(config, dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if reason.startswith("Unrecognized configuration class"):
            reason = "transformers has no causal language model class for it"
        raise CheckpointError(
            f"architecture {config.model_type!r} is no causal language model that can be built: "
            f"{reason}"
        ) from None
    _refuse_encoder(model)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def is_wrapper(model: Any) -> bool:
    """Whether a model is multimodal, with a text model inside."""
    inside = model.config.get_text_config(decoder=True) is not model.config
    return inside and type(model).__name__ in _wrappers(model.config.model_type)


def text_path(model: Any) -> str:
    """The name of the text model in a wrapper; empty where it is not known."""
    with torch.no_grad():
        text = model.get_decoder()
    names = [name for name, module in model.named_modules() if module is text]
    return names[0] if names else ""


def decoder_blocks(model: Any, config: Any) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList as long as the config has layers, inside the text model where that
    is known: a vision tower may be as deep.

    Raises:
        CheckpointError: there is none, or blocks share their weights or attend to an encoder.
    """
    text = config.get_text_config(decoder=True)
    inside = text_path(model)
    # some families count the attentions of a block as layers
    for depth in (getattr(text, "num_hidden_layers", None), getattr(text, "num_layers", None)):
        lists = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        ]
        lists = [found for found in lists if found[0].startswith(f"{inside}.")] or lists
        if lists:
            path, blocks = min(lists, key=lambda item: item[0].count("."))
            _refuse_cross_attention(blocks, config.model_type)
            _refuse_shared(path, blocks, config.model_type)
            return path, blocks
    depth = getattr(text, "num_hidden_layers", None) or 0
    if not depth:
        raise CheckpointError(
            f"the config of a {config.model_type} model does not say how many decoder blocks it "
            f"has; only causal language models of decoder blocks alone are compressed"
        )
    stacks = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and depth > len(module) > 1
    }
    for name, count in stacks.items():
        if depth % count == 0:
            raise CheckpointError(
                f"a {config.model_type} model goes through its blocks more than once: {name} holds "
                f"{count}, config.json has {depth} layers; that cannot be compressed block by block"
            )
    raise CheckpointError(
        f"architecture {config.model_type!r} has no stack of {depth} decoder blocks that could be "
        f"found"
    )


def _wrappers(kind: str) -> tuple[str, ...]:
    """Names of the multimodal classes of a model type."""
    from transformers.models.auto import modeling_auto

    maps = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    names = [
        getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).get(kind) for name in maps
    ]
    return tuple(name for name in names if isinstance(name, str))


def wrapper_class(config: Any, architectures: Sequence[str]) -> Any:
    """The multimodal class that config.json names, if transformers has it for this config."""
    import transformers

    for name in architectures:
        if name in _wrappers(config.model_type):
            return getattr(transformers, name, None)
    return None


def named_class(config: Any, architectures: Sequence[str]) -> Any:
    """The causal class that config.json names, of a config that no auto class of transformers
    takes: the text half of a multimodal family. None where there is none.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    if type(config) in AutoModelForCausalLM._model_mapping:
        return None
    for name in architectures:
        kind = getattr(transformers, name, None)
        if name.endswith("ForCausalLM") and getattr(kind, "config_class", None) is type(config):
            return kind
    return None


def _refuse_encoder_decoder(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"a {config.model_type} model is an encoder-decoder; only causal language models of "
            "decoder blocks alone are compressed"
        )


def _refuse_encoder(model: Any) -> None:
    """Raise CheckpointError for a model whose tokens attend to later ones."""
    kind = model.config.model_type
    both_ways = getattr(model.config, "attn_type", "uni") == "bi"  # of a permutation model
    if both_ways or getattr(model.config, "causal", True) is False:
        key = "attn_type 'bi'" if both_ways else "causal false"
        raise CheckpointError(
            f"a {kind} model lets tokens attend to later ones (config.json says {key}); only "
            "causal language models of decoder blocks alone are compressed"
        )
    layers = any(vars(module).get("is_decoder") is False for module in model.modules())
    if getattr(model.config, "is_decoder", True) is False and layers:
        raise CheckpointError(
            f"a {kind} model is an encoder (config.json does not say is_decoder); only causal "
            "language models of decoder blocks alone are compressed"
        )


def _refuse_cross_attention(blocks: nn.ModuleList, kind: str) -> None:
    names = {name.rpartition(".")[2] for name, _ in blocks.named_modules()}
    if names & {"encoder_attn", "crossattention", "cross_attn"}:
        raise CheckpointError(
            f"a {kind} model has blocks that attend to what another model gives (an encoder); only "
            "causal language models of decoder blocks alone are compressed"
        )


def _refuse_shared(path: str, blocks: nn.ModuleList, kind: str) -> None:
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            first = owner.setdefault(id(parameter), index)
            if first != index:
                raise CheckpointError(
                    f"a {kind} model shares {name} between the blocks {path}.{first} and "
                    f"{path}.{index}; shared weights cannot be compressed block by block"
                )

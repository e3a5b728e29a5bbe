"""Shapes of well-known models, to be measured with random weights where no checkpoint is at hand,
and the model itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

MODELS: dict[str, dict[str, Any]] = {
    "tinyllama": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""Name -> what differs from transformers' LlamaConfig."""


def linears_of(name: str) -> list[tuple[int, int]]:
    """(out, in) of the linears in a block, each shape once."""
    config = MODELS[name]
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    return [(width, width), (keys, width), (inner, width), (width, inner)]


def random_model(name: str, runtime: str, device: torch.device) -> Any:
    """A Llama of a shape of MODELS with random weights in bfloat16: 2:4 linears in its blocks where
    `runtime` is `packed`, dense ones where it is `dense`.

    Tensors are made where they stay, one by one, so that the peak memory is that of a load.
    """
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from compressor.model import heap
    from compressor.runtime.placement import place

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**MODELS[name]))
    model.to(torch.bfloat16)
    names = [
        path
        for path, part in model.named_modules()
        if isinstance(part, nn.Linear) and ".layers." in path
    ]
    if runtime == "packed":
        for path in names:
            model.set_submodule(path, _random24(model.get_submodule(path), device))
        heap.give_back()
    _fill(model, device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    if runtime == "packed":
        place(model, {path: path for path in names}, runtime)
    return model.eval()


def _random24(old: nn.Linear, device: torch.device) -> nn.Module:
    import torch

    from compressor_kernels.linear import Sparse24Linear

    new = Sparse24Linear(
        old.in_features, old.out_features, bias=False, dtype=torch.bfloat16, device=device
    )
    new.weight_values.normal_(std=old.in_features**-0.5)  # in place
    new.weight_metadata.copy_(random_positions(*new.weight_metadata.shape))
    return new


def random_positions(out: int, words: int) -> torch.Tensor:
    """Metadata of a 2:4 weight, int16 `[out, words]`: every group names two columns."""
    import torch

    pairs = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.int16)
    found = torch.zeros(out, words, dtype=torch.int16)
    for nibble in range(4):
        found |= pairs[torch.randint(6, found.shape, dtype=torch.uint8).int()] << 4 * nibble
    return found


def _fill(model: Any, device: torch.device) -> None:
    """Random numbers for every parameter that has none yet, ones for norms; the head may be the
    embeddings'.
    """
    import torch
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    for path, tensor in list(model.named_parameters(remove_duplicate=False)):
        if not tensor.is_meta:
            continue
        if id(tensor) not in made:
            filled = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            filled.fill_(1) if tensor.ndim == 1 else filled.normal_(std=0.02)
            made[id(tensor)] = nn.Parameter(filled, requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[id(tensor)])

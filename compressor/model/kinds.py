"""Which blocks of a model are alike: what was seen of one is true of the others."""

from __future__ import annotations

from typing import Any

from torch import nn


def kind(block: nn.Module, config: Any, index: int) -> tuple[Any, ...]:
    """What blocks of one kind have in common: classes and shapes of all their parts, and the type
    of layer that the config gives them.

    Args:
        block: the block.
        config: of the text model.
        index: of the block.
    """
    types = getattr(config, "layer_types", None) or ()
    return (
        types[index] if index < len(types) else None,
        *((name, type(module)) for name, module in block.named_modules()),
        *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()),
    )

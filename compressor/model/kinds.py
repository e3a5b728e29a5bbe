"""Which blocks of a model are alike: what was seen of one is true of the others."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import nn


def first_of_each_kind(
    blocks: Iterable[nn.Module], config: Any, given: Sequence[Hashable] = ()
) -> list[int]:
    """Indices of the blocks that no block before them is like.

    Args:
        blocks: all of a model.
        config: of the model.
        given: for each block what else those of one kind have in common.
    """
    text, first = config.get_text_config(decoder=True), {}
    for index, block in enumerate(blocks):
        also = given[index] if given else None
        first.setdefault((kind(block, text, index), also), index)
    return list(first.values())


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

"""What a block is called with beside its hidden states, and what it hands on to later blocks.

An argument is one of

- a value that is the same for all batches (masks, rotary tables): kept once;
- a value that differs between batches (inputs of a layer that depend on the tokens, the token ids
  themselves): kept for every batch;
- what an earlier block returned beside its hidden states (the indices of an indexer, the states of
  a router): `("returned", block, place)`;
- a dictionary that all blocks of one forward pass are given, empty before the first: they leave
  values in it for later ones (shared keys and values): `("left", dictionary, entry, place)`.

The last two are pieces of a `Batch`, because they depend on the compressed blocks before.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from compressor.calibration.hidden_states import Batch, Key
from compressor.errors import CheckpointError

ALONE = -1  # place of an entry of a dictionary that is a tensor and not a tuple of them


@dataclass(frozen=True)
class Differing:
    """Stands for a value that differs between batches: `values[number]`."""

    values: Sequence[Any]


@dataclass(frozen=True)
class Returned:
    """Stands for what block `block` returned at `place`: 0 is the first after the hidden states."""

    block: int
    place: int

    @property
    def key(self) -> Key:
        """Of the piece of a batch."""
        return ("returned", self.block, self.place)


@dataclass(frozen=True)
class Dictionary:
    """Stands for a dictionary that blocks are given to leave values in; `empty` is a copy of it."""

    number: int
    empty: Any


@dataclass(frozen=True)
class Call:
    """The arguments of one call, and the dictionaries among them."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    dictionaries: dict[int, MutableMapping[Any, Any]]


@dataclass
class Arguments:
    """Of one block.

    Attributes:
        positional, keywords: the values, or what stands for them.
        block: its index.
        by_name: the hidden states are given as `hidden_states=`.
        later: keys of what a later block reads, as far as they are known before any block ran.
        dictionaries: numbers of the dictionaries that a later block is given.
    """

    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    block: int = 0
    by_name: bool = False
    later: frozenset[Key] = frozenset()
    dictionaries: frozenset[int] = frozenset()

    def of(self, batch: Batch) -> Call:
        """The arguments for a batch."""
        dictionaries: dict[int, MutableMapping[Any, Any]] = {}

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Differing):
                return leaf.values[batch.number]
            if isinstance(leaf, Returned):
                return batch.handed.get(leaf.key)
            if isinstance(leaf, Dictionary):
                if leaf.number not in dictionaries:
                    dictionaries[leaf.number] = _filled(leaf, batch.handed)
                return dictionaries[leaf.number]
            return leaf

        positional, items = tree_map(value, tree_of(self.positional, self.keywords))
        return Call(positional, dict(items), dictionaries)

    def call(self, block: Callable[..., Any], batch: Batch) -> Batch:
        """`block`, or a function that is called as it is, applied to a batch; differentiable.

        Raises:
            CheckpointError: it asks a dictionary for what no block left there.
        """
        call = self.of(batch)
        try:
            if self.by_name:
                output = block(hidden_states=batch.hidden, **call.keywords)
            else:
                output = block(batch.hidden, *call.positional, **call.keywords)
        except KeyError as error:
            if not call.dictionaries:
                raise
            raise CheckpointError(
                f"block {self.block} asks for {error} of an earlier block, which left nothing"
            ) from None
        hidden, *returned = output if isinstance(output, tuple | list) else (output,)
        return Batch(batch.number, hidden, self._handed(batch, returned, call))

    def _handed(self, batch: Batch, returned: Sequence[Any], call: Call) -> dict[Key, Tensor]:
        """What later blocks read: of what was handed to this block, and of what it made."""
        handed = {key: tensor for key, tensor in batch.handed.items() if key in self.later}
        for place, value in enumerate(returned):
            if (key := Returned(self.block, place).key) in self.later and value is not None:
                handed[key] = value
        for number in self.dictionaries:
            if number in call.dictionaries:
                handed |= left_in(number, call.dictionaries[number])
            else:  # this block was not given it
                left = ("left", number)
                handed |= {key: value for key, value in batch.handed.items() if key[:2] == left}
        return handed


def left_in(number: int, dictionary: Mapping[Any, Any]) -> dict[Key, Tensor]:
    """The tensors in a dictionary, by key."""
    found: dict[Key, Tensor] = {}
    for entry, value in dictionary.items():
        if isinstance(value, tuple | list):
            found |= {("left", number, entry, place): part for place, part in enumerate(value)}
        else:
            found["left", number, entry, ALONE] = value
    return found


def _filled(leaf: Dictionary, handed: Mapping[Key, Tensor]) -> MutableMapping[Any, Any]:
    """A dictionary of its own for one call, with what earlier blocks left."""
    filled = copy.copy(leaf.empty)
    entries: dict[Any, dict[int, Tensor]] = {}
    for (kind, number, *rest), tensor in handed.items():
        if (kind, number) == ("left", leaf.number):
            entry, place = rest
            entries.setdefault(entry, {})[int(place)] = tensor
    for entry, parts in entries.items():
        filled[entry] = parts[ALONE] if ALONE in parts else tuple(parts[n] for n in sorted(parts))
    return filled


def tree_of(positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, Any]:
    """Both kinds of arguments as one tree."""
    return positional, tuple(keywords.items())


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` applied to what is inside its tuples, lists and dictionaries."""
    if type(value) is tuple or type(value) is list:
        return type(value)(tree_map(function, part) for part in value)
    if type(value) is dict and value:
        return {key: tree_map(function, part) for key, part in value.items()}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """What is inside the tuples, lists and dictionaries of `value`, in the order of `tree_map`."""
    if type(value) is tuple or type(value) is list:
        for part in value:
            yield from leaves(part)
    elif type(value) is dict and value:
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


def is_empty_dictionary(value: Any) -> bool:
    """Whether blocks can leave values in it that were not there before the first."""
    return isinstance(value, dict | UserDict) and not value


def link(arguments: Sequence[Arguments]) -> list[Arguments]:
    """The arguments of all blocks, each knowing what the blocks after it read."""
    later: set[Key] = set()
    dictionaries: set[int] = set()
    linked = []
    for own in reversed(arguments):
        linked.append(replace(own, later=frozenset(later), dictionaries=frozenset(dictionaries)))
        for leaf in leaves(tree_of(own.positional, own.keywords)):
            if isinstance(leaf, Returned):
                later.add(leaf.key)
            elif isinstance(leaf, Dictionary):
                dictionaries.add(leaf.number)
    return linked[::-1]

"""Stands in for the blocks while the model's own forward runs, and learns what each is called with.

Everything that block by block would do otherwise than the model itself is refused here: blocks
called in another order or more than once, hidden states that change between blocks, arguments
whose kind is not understood.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.arguments import (
    Arguments,
    Dictionary,
    Differing,
    Returned,
    is_empty_dictionary,
    leaves,
    link,
    tree_map,
    tree_of,
)
from compressor.errors import CheckpointError

Store = Callable[[int], Any]
"""An empty sequence of tensors with `append`, for the differing argument of this number."""


class Nothing:
    """What stands for a None that a block returned: one that can be followed."""


class Recorder:
    """Takes the place of the blocks in the model's own forward, batch by batch.

    Args:
        kind: the model's type, for messages.
        blocks: how many there are.
        first: block 0, called for real once: it shows what blocks return.
        store: where differing tensors go.

    Attributes:
        kept: hidden states entering block 0, of the batch under way.
        returns: what a block returns, after the first batch.
    """

    def __init__(self, kind: str, blocks: int, first: Callable[..., Any], store: Store) -> None:
        self.kind, self.blocks, self._first, self._store = kind, blocks, first, store
        self.returns: Returns | None = None
        self.kept: Tensor | None = None
        self._batch = -1
        self._known: list[tuple[bool, list[Any], Any]] = []  # by name, leaves, their tree
        self._differing: dict[tuple[int, int], Differing] = {}
        self._of_base: dict[int, Differing] = {}

    def begin(self) -> None:
        """Before each batch."""
        self._batch += 1
        self._called = 0
        self._left: Tensor | None = None
        self._handed: dict[int, Returned] = {}
        self._dictionaries: dict[int, Dictionary] = {}
        self._held: list[Any] = []  # objects that are known by their id stay alive
        self._appended: dict[int, Any] = {}

    def end(self) -> None:
        """After each batch. Raises CheckpointError where not every block was called."""
        if self._called != self.blocks:
            raise self._refusal(f"calls {self._called} of its {self.blocks} blocks in order")

    def forward(self, index: int) -> Callable[..., Any]:
        """What block `index` is replaced by."""

        def forward(*positional: Any, **keywords: Any) -> Any:
            by_name = not positional
            hidden = keywords.pop("hidden_states") if by_name else positional[0]
            self._check(index, hidden)
            self._learn(index, by_name, tree_of(positional[0 if by_name else 1 :], keywords))
            if index == 0:
                self.kept = hidden
                if self.returns is None:
                    answer = self._first_answer(positional, keywords, hidden)
                    if isinstance(answer, tuple) and type(answer) is not tuple:
                        raise self._refusal(f"returns a {type(answer).__name__} from its blocks")
                    self.returns = Returns(answer)
            self._called, self._left = index + 1, hidden
            assert self.returns is not None
            answer, handed = self.returns.passing(hidden)
            self._handed |= {id(value): Returned(index, n) for n, value in enumerate(handed)}
            self._held += handed
            return answer

        return forward

    def _first_answer(self, positional: Any, keywords: Any, hidden: Tensor) -> Any:
        """What block 0 returns. What it leaves in a dictionary is not for the recorded calls."""
        named = keywords if positional else {**keywords, "hidden_states": hidden}
        positional, items = tree_map(
            lambda leaf: copy.copy(leaf) if is_empty_dictionary(leaf) else leaf,
            tree_of(positional, named),
        )
        return self._first(*positional, **dict(items))

    def arguments(self) -> list[Arguments]:
        """Of every block, once all batches have passed."""
        found = []
        for index, (by_name, known, tree) in enumerate(self._known):
            replaced = iter(self._differing.get((index, n), leaf) for n, leaf in enumerate(known))
            positional, items = tree_map(lambda _, it=replaced: next(it), tree)
            found.append(Arguments(positional, dict(items), index, by_name))
        return link(found)

    def _check(self, index: int, hidden: Tensor) -> None:
        if index != self._called:
            raise self._refusal(f"calls block {index} after block {self._called - 1}")
        left = self._left
        if left is not None and hidden is not left:
            same = hidden.shape == left.shape and hidden.dtype == left.dtype
            if not same or not torch.equal(hidden, left):
                raise self._refusal(f"changes the hidden states between block {index - 1} and it")

    def _learn(self, index: int, by_name: bool, tree: Any) -> None:
        """Note the arguments in the first batch; in a later one, those that differ."""
        marked = [self._marked(leaf) for leaf in leaves(tree)]
        if self._batch == 0:
            self._known.append((by_name, marked, tree))
            return
        known = self._known[index][1]
        if len(known) != len(marked):
            raise self._refusal(f"calls block {index} with other arguments in every batch")
        for place, (base, leaf) in enumerate(zip(known, marked, strict=True)):
            differing = self._differing.get((index, place)) or self._of_base.get(id(base))
            if differing is None and not _same(base, leaf):
                differing = self._new_differing(index, base, leaf)
            if differing is not None:
                self._differing[index, place] = differing
                self._append(index, differing, leaf)

    def _marked(self, leaf: Any) -> Any:
        """The leaf, or what stands for it where it came from an earlier block."""
        if (returned := self._handed.get(id(leaf))) is not None:
            return returned
        if is_empty_dictionary(leaf):
            known = self._dictionaries
            self._held.append(leaf)
            return known.setdefault(id(leaf), Dictionary(len(known), leaf))
        return leaf

    def _new_differing(self, index: int, base: Any, leaf: Any) -> Differing:
        stands = Returned | Dictionary
        if isinstance(base, stands) or isinstance(leaf, stands) or type(base) is not type(leaf):
            raise self._refusal(f"calls block {index} with other kinds of arguments in every batch")
        if isinstance(leaf, Tensor):
            values = self._store(len(self._of_base))
        elif isinstance(leaf, int | float | str):
            values = []
        else:
            raise self._refusal(
                f"calls block {index} with a {type(leaf).__name__} that differs between batches"
            )
        for _ in range(self._batch):
            values.append(base)
        return self._of_base.setdefault(id(base), Differing(values))

    def _append(self, index: int, differing: Differing, leaf: Any) -> None:
        """Add this batch's value, once: an argument of many blocks is one object."""
        key = id(differing)
        if key not in self._appended:
            differing.values.append(leaf)  # type: ignore[attr-defined]  # a list or a store
            self._appended[key] = leaf
        elif not _same(self._appended[key], leaf):
            raise self._refusal(f"gives block {index} what other blocks shared in the first batch")

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"a {self.kind} model {what}; it cannot be compressed block by block"
        )


class Returns:
    """What blocks return: a tensor, or a tuple or list that begins with it."""

    def __init__(self, answer: Any) -> None:
        self.kind = type(answer) if isinstance(answer, tuple | list) else None
        self.rest = list(answer[1:]) if self.kind else []

    def passing(self, hidden: Tensor) -> tuple[Any, list[Any]]:
        """What a block returns that passes `hidden` through, and the further objects in it: each
        a new one, so that it can be followed.
        """
        if self.kind is None:
            return hidden, []
        rest = [value.clone() if isinstance(value, Tensor) else Nothing() for value in self.rest]
        answer = (hidden, *rest)
        return (answer if self.kind is tuple else list(answer)), rest


def _same(one: Any, other: Any) -> bool:
    """Whether an argument is the same in two batches."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Dictionary) and isinstance(other, Dictionary):
        return one.number == other.number
    if type(one) is not type(other):
        return False
    return one == other if isinstance(one, int | float | str | Returned) else False

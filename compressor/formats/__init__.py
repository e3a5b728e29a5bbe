"""Stored forms of a weight, one file each; the file name is the format's name in config.json.

A form has three verbs: `dense()` gives the weight `[out, in]`, `pack()` the tensors that are stored, by the suffix that
replaces `weight` in the tensor's name, and the class method `unpack(tensors)` the form again. A form may have `notes`, what
its method wants said about it in the report; they are not stored with it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from compressor.errors import CheckpointError


@runtime_checkable
class Form(Protocol):
    """What every stored form can do."""

    FORMAT: ClassVar[str]

    @property
    def entry(self) -> dict[str, Any]:
        """What config.json says of it: its format, and what a loader must know before it reads a tensor."""
        ...

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; of the core, where the weight is a product of factors."""
        ...

    def dense(self) -> Tensor:
        """The weight this form stands for, `[out, in]`."""
        ...

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors, by suffix."""
        ...

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        """The form stored as `tensors`. Raises ValueError where they do not belong together."""
        ...


def form_class(name: str) -> type[Form]:
    """The form named `name` in config.json. Raises CheckpointError for an unknown name."""
    from compressor.formats.armor import Armor
    from compressor.formats.dense import Dense
    from compressor.formats.sparse24 import Sparse24

    known: dict[str, type[Form]] = {"dense": Dense, "sparse24": Sparse24, "armor": Armor}
    if name not in known:
        raise CheckpointError(f"unknown format {name!r}; this version knows {', '.join(known)}")
    return known[name]

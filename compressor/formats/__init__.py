"""Stored forms of a weight, one file each; the file name is the format's name in config.json.

A form has three verbs: `dense()` gives the weight `[out, in]`, `pack()` the tensors that are
stored, by the suffix that replaces `weight` in the tensor's name, and the class method
`unpack(tensors)` the form again. For training it comes apart:
`factors()` are plain matrices, `product` multiplies them, differentiably, and `from_factors` makes
a form of them again. A form may carry what its method wants said of it in the report: `note`, and
`losses`, the relative loss at start and end.
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
        """What config.json says of it: its format, and what a loader must know before it reads a
        tensor.
        """
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

    def factors(self) -> dict[str, Tensor]:
        """What the weight is a product of, by the argument names of `product`; zeros of the pattern
        are zeros in it.
        """
        ...

    @staticmethod
    def product(*args: Any, **factors: Any) -> Tensor:
        """The weight `[out, in]` of these factors, differentiable in each."""
        ...

    @classmethod
    def from_factors(cls, *args: Any, **factors: Any) -> Self:
        """The form of these factors, in their dtype."""
        ...

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> Self:
        """The form stored as `tensors`. Raises ValueError where they do not belong together."""
        ...


def notes(form: Form) -> dict[str, Any]:
    """What a form carries for the report: `note` and `losses`, if it has them."""
    return {part: value for part in ("note", "losses") if (value := getattr(form, part, None))}


def form_class(name: str) -> type[Form]:
    """The form named `name` in config.json. Raises CheckpointError for an unknown name."""
    from compressor.formats.armor import Armor
    from compressor.formats.dense import Dense
    from compressor.formats.lowrank import LowRank
    from compressor.formats.sparse24 import Sparse24

    known: dict[str, type[Form]] = {
        "dense": Dense,
        "sparse24": Sparse24,
        "armor": Armor,
        "lowrank": LowRank,
    }
    if name not in known:
        raise CheckpointError(f"unknown format {name!r}; this version knows {', '.join(known)}")
    return known[name]

"""What every stored form says of itself: its tensors, its entry in config.json, its module, its
words for people, and how a weight comes into it and out of it.

A form is one class in one file of this folder. All that is asked of headers and entries alone is
static and needs no torch, so a file here imports torch and the kernels inside the functions that
compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, int]
"""Of a dense weight: (out, in)."""


class Spec(NamedTuple):
    """A tensor as a safetensors header describes it; `dtype` is its name there, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Form(Protocol):
    """What every stored form can do. The members with a body are defaults: those of a form with
    zeros, whose entry says nothing but its format, and which no fine-tuning trains where it lies.
    """

    FORMAT: ClassVar[str]
    """Its name in config.json and in reports, and of its file here."""

    SUFFIXES: ClassVar[tuple[str, ...]]
    """What replaces `weight` in the names of its tensors, in the order they are written."""

    SPARSE: ClassVar[bool] = True
    """Whether there are zeros in it: a weight without is smaller because there are fewer numbers
    (factors of a rank).
    """

    TRAINABLE: ClassVar[tuple[str, ...]] = ()
    """The suffixes of plain matrices, which a recovery fine-tuning may train as they are."""

    # Of headers and entries: no torch.

    @staticmethod
    def dense_spec(stored: Mapping[str, Spec]) -> Spec:
        """The dense weight `[out, in]` that tensors with these headers, by suffix, stand for.
        Raises ValueError where a shape tells no weight.
        """
        ...

    @staticmethod
    def stored_specs(entry: Mapping[str, Any], dense: Spec) -> dict[str, Spec]:
        """The tensors, by suffix, of a dense weight `[out, in]`, for an entry that fits it. A value
        that is stored in another way (a dtype, scales of its own) is said here and nowhere else.
        """
        ...

    @classmethod
    def check_entry(cls, entry: Mapping[str, Any], shape: Shape) -> None:
        """Raise ValueError, with words that go on from "config.json gives NAME", unless the entry
        fits a weight of this shape.
        """

    @classmethod
    def parameters(cls, entry: Mapping[str, Any], shape: Shape) -> int:
        """Numbers of the matrices that stand in memory once it is unpacked."""
        return math.prod(shape)

    @classmethod
    def label(cls, entry: Mapping[str, Any]) -> str:
        """A word or two for tables."""
        return cls.FORMAT

    @staticmethod
    def told(rows: Sequence[Mapping[str, Any]]) -> str:
        """What follows "12 linears, " in a card, of the report's rows of these linears."""
        ...

    # Modules.

    @classmethod
    def module(
        cls, entry: Mapping[str, Any], in_features: int, out_features: int, **common: Any
    ) -> nn.Module:
        """An empty module whose state is the stored tensors. `common` is `bias`, `dtype` and
        `device`; the entry was checked.
        """
        ...

    @classmethod
    def example(cls, weight: Tensor) -> Self | None:
        """One of the 2:4 `weight` `[out, in]`, or with random numbers and of its shape, to time the
        kernels with. None where there are none for it.
        """
        return None

    # Of tensors.

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        """The form of a plain weight `[out, in]`, zeros in place. Raises ValueError where it cannot
        take this one.
        """
        raise ValueError(f"a plain weight is not stored as {cls.FORMAT}")

    def dense(self) -> Tensor:
        """The weight this form stands for, `[out, in]`."""
        ...

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; of the core, where the weight is a product of factors."""
        ...

    @property
    def entry(self) -> dict[str, Any]:
        """What config.json says of it: its format, and what a loader must know before it reads a
        tensor.
        """
        return {"format": self.FORMAT}

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors, by suffix: `weight_values` is the attribute `values`."""
        return {suffix: getattr(self, suffix.removeprefix("weight_")) for suffix in self.SUFFIXES}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The form stored as `tensors`. Raises KeyError for one that lacks, ValueError where they
        do not belong together.
        """
        ...

    def check_canonical(self) -> None:
        """Raise ValueError unless it is stored in the one way that the format prescribes for its
        weight.
        """

    # For training it comes apart: plain matrices, and how they are multiplied. A form of one matrix
    # has nothing to say here.

    def factors(self) -> dict[str, Tensor]:
        """What the weight is a product of, by the argument names of `product`; zeros of the pattern
        are zeros in it.
        """
        return {"weight": self.dense()}

    @staticmethod
    def product(*args: Any, **factors: Any) -> Tensor:
        """The weight `[out, in]` of these factors, differentiable in each."""
        return factors["weight"]

    @classmethod
    def from_factors(cls, *args: Any, **factors: Any) -> Self:
        """The form of these factors, in their dtype."""
        return cls.from_dense(factors["weight"])


def matrix(stored: Mapping[str, Spec], suffix: str) -> Shape:
    """The shape of a stored tensor that is a matrix. Raises ValueError where it is none."""
    shape = stored[suffix].shape
    if len(shape) != 2:
        raise ValueError(f"{suffix} has shape {list(shape)}, a matrix is expected")
    return shape[0], shape[1]


def weights(rows: Sequence[Mapping[str, Any]]) -> int:
    """Of the dense linears of these rows of a report; at least one."""
    return sum(math.prod(row["shape"][:2]) for row in rows) or 1


def zeros(rows: Sequence[Mapping[str, Any]]) -> str:
    """`50.0% zeros`, of all weights of these rows of a report."""
    found = sum(row["sparsity"] * math.prod(row["shape"][:2]) for row in rows)
    return f"{found / weights(rows):.1%} zeros"

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
    import torch
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
    """What every stored form can do. The members with a body are defaults, right for a form of one
    matrix with zeros whose entry is its format alone.
    """

    FORMAT: ClassVar[str]
    """Its name in config.json and in reports, and of its file here."""

    SUFFIXES: ClassVar[tuple[str, ...]]
    """What replaces `weight` in the names of its tensors, in the order they are written."""

    SPARSE: ClassVar[bool] = True
    """Whether it has zeros. Factors of a rank have none: they are smaller by having fewer
    numbers.
    """

    TRAINABLE: ClassVar[tuple[str, ...]] = ()
    """Suffixes of plain matrices: fine-tuning can train them, torch multiplies them anywhere."""

    # Of headers and entries: no torch.

    @staticmethod
    def dense_shape(stored: Mapping[str, Spec]) -> Shape:
        """(out, in) of the weight that tensors with these headers, by suffix, stand for. Raises
        ValueError for a shape that no weight has, KeyError for a tensor that lacks.
        """
        ...

    @classmethod
    def dense_dtype(cls, entry: Mapping[str, Any], stored: Mapping[str, Spec]) -> str:
        """The dtype of that weight, such as `BF16`: of the first tensor. A form that keeps its
        numbers in another has the weight's in its entry, as `dtype`; `check_entry` was asked.
        """
        return stored[cls.SUFFIXES[0]].dtype

    @staticmethod
    def stored_specs(entry: Mapping[str, Any], dense: Spec) -> dict[str, Spec]:
        """The tensors, by suffix, that store a dense weight `[out, in]` as an entry says that fits
        it. The only list of them: other dtypes of the values, or scales beside them, stand here.
        """
        ...

    @classmethod
    def check_entry(cls, entry: Mapping[str, Any], shape: Shape) -> None:
        """Raise ValueError, with words that go on from "config.json gives NAME", unless the entry
        fits a weight of this shape.
        """

    @classmethod
    def parameters(cls, entry: Mapping[str, Any], shape: Shape) -> int:
        """How many numbers are in memory once it is unpacked: of the weight, or of its factors."""
        return math.prod(shape)

    @classmethod
    def label(cls, entry: Mapping[str, Any]) -> str:
        """A word or two for tables."""
        return cls.FORMAT

    @staticmethod
    def told(rows: Sequence[Mapping[str, Any]]) -> str:
        """Words for people that go on from "12 linears, ", of the report's rows of these."""
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
        """What the benchmarks time: the 2:4 `weight` `[out, in]` in this form, or random factors of
        its shape. None where no kernel runs it.
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
    def unpack(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The form stored as `tensors`, by suffix; `check_entry` was asked of its entry. Raises
        KeyError for one that lacks, ValueError where they do not belong together.
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


def notes(form: Form) -> dict[str, Any]:
    """What a form carries for the report, by the names of its fields: `note`, a sentence, and
    `losses`, the relative loss its method started from and arrived at; only those it has.
    """
    return {part: value for part in ("note", "losses") if (value := getattr(form, part, None))}


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors headers, and the entries of forms, call a dtype of torch."""
    return _names()[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch that safetensors headers call `name`."""
    return {known: dtype for dtype, known in _names().items()}[name]


def _names() -> dict[torch.dtype, str]:
    import torch

    return {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
    }


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

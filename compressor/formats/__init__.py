"""The stored forms of a weight, one file each. form.py says what a form is; whoever meets a form by
its name asks the table below. Importing it takes no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError
from compressor.formats.armor import Armor
from compressor.formats.dense import Dense
from compressor.formats.form import Form, Shape, Spec, notes
from compressor.formats.lowrank import LowRank
from compressor.formats.pivot import Pivot
from compressor.formats.sparse24 import Sparse24

__all__ = [
    "FORMATS",
    "PACKED",
    "Form",
    "Spec",
    "checked_shape",
    "form_class",
    "form_of",
    "notes",
]

if TYPE_CHECKING:
    from torch import Tensor

FORMATS: dict[str, type[Form]] = {
    "dense": Dense,
    "sparse24": Sparse24,
    "armor": Armor,
    "lowrank": LowRank,
    "pivot": Pivot,
}
"""Every form by its name in config.json."""

PACKED = tuple(name for name, form in FORMATS.items() if form is not Dense)
"""Those that config.json lists: all but the plain weight."""


def form_class(name: str) -> type[Form]:
    """The form named `name` in config.json. Raises CheckpointError for an unknown name."""
    if name not in FORMATS:
        raise CheckpointError(
            f"unknown format {name!r}; this version knows {', '.join(FORMATS)}: update compress-llm"
        )
    return FORMATS[name]


def checked_shape(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Shape:
    """(out, in) of the weight that is stored as `tensors`, by suffix, once its entry of config.json
    was checked. Raises CheckpointError for an unknown format, KeyError for a tensor that lacks,
    ValueError where the entry or a shape is none.
    """
    form = form_class(entry["format"])
    shape = form.dense_shape({key: Spec("", tuple(t.shape)) for key, t in tensors.items()})
    try:
        form.check_entry(entry, shape)
    except ValueError as error:
        raise ValueError(f"config.json gives it {error}") from None
    return shape


def form_of(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Form:
    """The form that is stored as `tensors`, by suffix, with this entry in config.json. Raises what
    `checked_shape` does, and ValueError where the tensors do not belong together.
    """
    checked_shape(entry, tensors)
    return form_class(entry["format"]).unpack(entry, tensors)

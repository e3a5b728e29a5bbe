"""The stored forms of a weight, one file each. form.py says what a form is; whoever meets a form by
its name asks the table below. Importing it takes no torch.
"""

from __future__ import annotations

from compressor.errors import CheckpointError
from compressor.formats.armor import Armor
from compressor.formats.dense import Dense
from compressor.formats.form import Form, Spec, notes
from compressor.formats.lowrank import LowRank
from compressor.formats.sparse24 import Sparse24

__all__ = ["FORMATS", "PACKED", "Form", "Spec", "form_class", "notes"]

FORMATS: dict[str, type[Form]] = {
    "dense": Dense,
    "sparse24": Sparse24,
    "armor": Armor,
    "lowrank": LowRank,
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

"""The table of settings: what a run can be asked for, each setting once.

`Recipe` has one field for each: its name, type, default and what is said of it. Recipe files, the
options of the command line, the keywords of the Python functions and their help come from here.
Which command takes which setting, and of what type from Python, say the dictionaries below it.

A new setting: a field of `Recipe`, a line in one of the dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from compressor.allocation.rank import ALLOCATORS as RANKS
from compressor.allocation.sparsity import ALLOCATORS as RATIOS
from compressor.errors import UsageError, did_you_mean
from compressor.methods import DEFAULT_FACTORIZATION, FACTORIZATIONS, METHODS, current_name
from compressor.refine import NAMES as REFINEMENTS

FORMATS = ["packed", "dense"]
DTYPES = ["auto", "float32", "bfloat16", "float16"]
EXPERT_TOKENS = ["routed", "all"]


class Said(NamedTuple):
    """What help says of a setting: a sentence, and its default in words."""

    help: str
    default: str = ""


def notes(help: str, default: str = "", **commands: Said) -> dict[str, Said]:
    """The metadata of a field: the sentence that help shows, which names other settings as `name`,
    and the default in words where the value does not say it. `commands`: what one says instead.
    """
    return {"": Said(help, default), **commands}


def said(name: str, command: str) -> Said:
    """What the help of `command` says of the setting `name`."""
    entry = next(entry for entry in fields(Recipe) if entry.name == name)
    text, default = entry.metadata.get(command, entry.metadata[""])
    return Said(text, default or ("" if entry.default in (MISSING, "") else str(entry.default)))


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True)
class Recipe:
    """Settings that decide the output; the device is not among them. Raises UsageError for a value
    that none can have.
    """

    model: str = field(metadata=notes("Checkpoint folder or Hub id."))
    revision: str = field(default="", metadata=notes("Branch, tag or commit of a Hub id."))
    method: str = field(
        default="wanda",
        metadata=notes(
            f"{either(METHODS)}.",
            lowrank=Said(f"{either(FACTORIZATIONS)}.", DEFAULT_FACTORIZATION),
            plan=Said(
                "As for prune or lowrank: plans are measured with it.",
                f"wanda, or {DEFAULT_FACTORIZATION} with `keep`",
            ),
        ),
    )
    refine: str = field(
        default="", metadata=notes(f"{either(REFINEMENTS)}: improve it at no extra bytes.", "none")
    )
    tune: int = field(
        default=0, metadata=notes("Epochs of training what was kept, block by block.")
    )
    match: str = field(
        default="",
        metadata=notes(
            "Have linears aim at the dense model's outputs: a strength from 0 to 1, or auto (each "
            "its own, by held-out rows).",
            "0",
        ),
    )
    pattern: str = field(
        default="2:4",
        metadata=notes("n:m (n of every m weights are kept) or a sparsity such as 50%."),
    )
    ratios: str = field(
        default="", metadata=notes(f"{either(RATIOS)}: share the zeros of a sparsity out.", "none")
    )
    dense_fraction: str = field(
        default="", metadata=notes("Of the weights, stay dense where n:m hurts most: 10%.", "none")
    )
    keep: str = field(
        default="", metadata=notes("Part of the linears' parameters to keep, such as 70%.")
    )
    ranks: str = field(
        default="",
        metadata=notes(f"{either(RANKS)}: how ranks are shared out.", "the method's own"),
    )
    plan: str = field(
        default="",
        metadata=notes(
            "What every linear becomes: a file of `compress plan`, or the plan.toml of a folder.",
        ),
    )
    format: str = field(
        default="packed", metadata=notes("packed (smaller) or dense (zeros in place).")
    )
    dataset: str = field(
        default="self",
        metadata=notes(
            "Calibration: .txt, .jsonl or .parquet file, Hub id, or self (the model writes it)."
        ),
    )
    text_column: str = field(
        default="",
        metadata=notes(
            "Field of the records that has the text, or a chat.", "text, messages or conversations"
        ),
    )
    num_samples: int = field(default=128, metadata=notes("Calibration sequences."))
    seq_len: int = field(
        default=0, metadata=notes("Tokens in each.", "min(2048, the model's limit)")
    )
    held_out: str = field(
        default="10%",
        metadata=notes(
            "Up to so many further sequences; nothing is fitted to them, errors are shown."
        ),
    )
    seed: int = field(default=0, metadata=notes("Of the calibration samples."))
    dtype: str = field(
        default="auto", metadata=notes("Of the forward passes; stored dtypes never change.")
    )
    expert_tokens: str = field(
        default="routed",
        metadata=notes(
            "What calibrates the experts of a mixture: the tokens routed to each (all where those "
            "are few), or all.",
        ),
    )
    trust_remote_code: bool = field(
        default=False, metadata=notes("Run Python code that the checkpoint brings.")
    )
    ignore: list[str] = field(
        default_factory=list,
        metadata=notes("Globs over the names of linears that stay dense.", "none"),
    )
    min_rows: int = field(
        default=128,
        metadata=notes(
            "A linear with fewer rows, and than 1/8 of its columns, stays dense; 0: none does."
        ),
    )
    refine_only: list[str] = field(
        default_factory=list,
        metadata=notes("Globs over the names of linears to refine, such as '*attn*'.", "all"),
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata=notes("Of the method, such as damp=0.05.")
    )
    refine_options: dict[str, Any] = field(
        default_factory=dict, metadata=notes("Of the refinement.")
    )
    ratio_options: dict[str, Any] = field(
        default_factory=dict, metadata=notes("Of `ratios` or `dense_fraction`.")
    )
    rank_options: dict[str, Any] = field(
        default_factory=dict, metadata=notes("Of `ranks`, such as align=32.")
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check_type(entry.name, getattr(self, entry.name), str(entry.type))
        object.__setattr__(self, "method", current_name(self.method))
        check_one_of("format", self.format, FORMATS)
        check_one_of("expert_tokens", self.expert_tokens, EXPERT_TOKENS)
        check_one_of("dtype", self.dtype, DTYPES)
        if self.num_samples < 1:
            raise UsageError(f"`num_samples` is {self.num_samples}; accepted: 1 or more")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"`seed` is {self.seed}; accepted: 0 or more, below 2^63")
        if self.min_rows < 0:
            raise UsageError(f"`min_rows` is {self.min_rows}; accepted: 0 or more")
        if self.tune < 0:
            raise UsageError(f"`tune` is {self.tune}; accepted: 0 or more epochs")
        if self.seq_len and self.seq_len < 2:
            raise UsageError(f"`seq_len` is {self.seq_len}; accepted: 2 or more")

    def to_toml(self) -> str:
        """The recipe as a TOML document that `read.load` reads back."""
        import tomli_w

        return tomli_w.dumps(asdict(self))


class _Method(TypedDict, total=False):
    method: str | None
    options: Mapping[str, Any] | None


class _Zeros(TypedDict, total=False):
    refine: str | None
    refine_options: Mapping[str, Any] | None
    pattern: str | None
    ratios: str | None
    ratio_options: Mapping[str, Any] | None
    dense_fraction: str | None


class _Factors(TypedDict, total=False):
    keep: str | None
    ranks: str | None
    rank_options: Mapping[str, Any] | None


class _Run(TypedDict, total=False):
    match: str | None
    tune: int | None
    plan: str | Path | None


class _Calibration(TypedDict, total=False):
    dataset: str | Path | None
    text_column: str | None
    num_samples: int | None
    seq_len: int | None
    held_out: str | None
    seed: int | None
    ignore: str | Sequence[str] | None
    min_rows: int | None
    dtype: str | None
    expert_tokens: str | None
    revision: str | None
    trust_remote_code: bool | None


class PruneSettings(_Method, _Zeros, _Run, _Calibration, total=False):
    """Of `compress prune` and `compressor.prune`; None is as if it were not given."""

    refine_only: str | Sequence[str] | None
    format: str | None


class LowrankSettings(_Method, _Factors, _Run, _Calibration, total=False):
    """Of `compress lowrank` and `compressor.lowrank`."""


class PlanSettings(_Method, _Zeros, _Factors, _Calibration, total=False):
    """Of `compress plan` and `compressor.plan`."""


SETTINGS: dict[str, list[str]] = {
    "prune": list(PruneSettings.__annotations__),
    "lowrank": list(LowrankSettings.__annotations__),
    "plan": list(PlanSettings.__annotations__),
}
"""Names of the settings that each command takes, in the order in which help shows them."""


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Raise UsageError; the name is that of a key in a recipe file as well."""
    kinds = {"str": str, "int": int, "bool": bool, "list[str]": list, "dict[str, Any]": dict}
    kind = kinds[annotation]
    right = type(value) is kind
    if right and kind in (list, dict):  # the keys of a dictionary
        right = all(isinstance(item, str) for item in value)
    if not right:
        raise UsageError(f"{name} is {value!r}; a value of type {annotation} is expected")


def check_one_of(name: str, value: str, accepted: list[str]) -> None:
    """Raise UsageError for another value than the accepted ones."""
    if value not in accepted:
        raise UsageError(
            f"`{name}` is {value!r}; accepted: {', '.join(accepted)}{did_you_mean(value, accepted)}"
        )

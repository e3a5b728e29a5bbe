"""What a run was asked to do: a TOML file, command-line values over it, defaults under it.

Recipes are TOML because YAML 1.1 reads `2:4` as the number 124. The complete recipe is written into
every output, so that any output can be made again from itself.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from compressor.config.bundled_recipes import find_plan
from compressor.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Recipe:
    """Settings that decide the output; the device is not among them.

    Attributes:
        model: folder or Hub id; `revision` of the latter.
        method: name of a file in `compressor/methods`; `options` are its keyword-only parameters.
        refine: name of a file in `compressor/refine`, or nothing; `refine_options` are its
            keyword-only parameters.
        refine_only: globs over linear names that it is for; all of them if there are none.
        tune: epochs of training the kept weights of each block towards the dense model's outputs; 0
            for none.
        pattern: `n:m` (n of every m are kept) or a sparsity such as `50%`.
        ratios: name of an allocator in `compressor/ratios`, or nothing; `ratio_options` are its
            keyword-only parameters.
        dense_fraction: such as `10%`: of the weights, may stay dense under n:m; its options are in
            `ratio_options` too.
        keep: such as `70%`: of the parameters of the linears, for a method that makes thin factors;
            `pattern` is not used then.
        ranks: name of an allocator in `compressor/ranks`, nothing for the method's own;
            `rank_options` are its keyword-only parameters.
        plan: file that says what every linear becomes; `pattern` is not used then. In a recipe file
            its path is relative to that file, and inside its folder.
        format: `packed`, or `dense` for a plain checkpoint with zeros.
        dataset, num_samples, seq_len, seed: calibration; `seq_len` 0 stands for min(2048, the
            model's limit).
        text_column: field of the dataset's records that has the text or the chat; empty for `text`,
            `messages` or `conversations`.
        expert_tokens: what calibrates the experts of a mixture: the tokens `routed` to each, or
            `all` of them.
        ignore: globs over linear names that stay dense.
        dtype: of the forward passes; `auto` is the checkpoint's. Stored dtypes never change.
    """

    model: str
    revision: str = ""
    method: str = "wanda"
    refine: str = ""
    tune: int = 0
    pattern: str = "2:4"
    ratios: str = ""
    dense_fraction: str = ""
    keep: str = ""
    ranks: str = ""
    plan: str = ""
    format: str = "packed"
    dataset: str = "self"
    text_column: str = ""
    num_samples: int = 128
    seq_len: int = 0
    seed: int = 0
    dtype: str = "auto"
    expert_tokens: str = "routed"
    trust_remote_code: bool = False
    ignore: list[str] = field(default_factory=list)
    refine_only: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    refine_options: dict[str, Any] = field(default_factory=dict)
    ratio_options: dict[str, Any] = field(default_factory=dict)
    rank_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check_type(entry.name, getattr(self, entry.name), str(entry.type))
        _one_of("format", self.format, ["packed", "dense"])
        _one_of("expert-tokens", self.expert_tokens, ["routed", "all"])
        _one_of("dtype", self.dtype, ["auto", "float32", "bfloat16", "float16"])
        if self.num_samples < 1:
            raise UsageError(f"num-samples is {self.num_samples}; accepted: 1 or more")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed is {self.seed}; accepted: 0 or more, below 2^63")
        if self.tune < 0:
            raise UsageError(f"tune is {self.tune}; accepted: 0 or more epochs")
        if self.seq_len and self.seq_len < 2:
            raise UsageError(f"seq-len is {self.seq_len}; accepted: 2 or more")

    def to_toml(self) -> str:
        """The recipe as a TOML document that `load` reads back."""
        import tomli_w

        return tomli_w.dumps(asdict(self))


def load(path: Path) -> dict[str, Any]:
    """The settings of a recipe file, unknown keys refused. Raises UsageError."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"recipe {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"recipe {path} is not readable TOML: {str(error)[:200]}") from None
    known = [entry.name for entry in fields(Recipe)]
    for key in settings:
        if key not in known:
            raise UsageError(
                f"recipe {path} has an unknown key {key!r}; known: "
                f"{', '.join(known)}{did_you_mean(key, known)}"
            )
    if isinstance(plan := settings.get("plan"), str) and plan:
        if Path(plan).is_absolute() or ".." in Path(plan).parts:
            raise UsageError(
                f"recipe {path} has the plan {plan[:200]!r}, which is not inside its folder; use "
                f"--plan for another"
            )
        settings["plan"] = str(find_plan(plan, path))
    return settings


def merge(recipe: Mapping[str, Any], given: Mapping[str, Any], assignments: list[str]) -> Recipe:
    """A Recipe from file settings, command-line values that are not None, and `--set` assignments.

    `name=value` is an option of the method, `lsq.name=value` one of the refinement `lsq`,
    `ratios.name=value` one of the ratios,
    `ranks.name=value` one of the ranks.
    """
    asked = Recipe(
        **{**recipe, **{key: value for key, value in given.items() if value is not None}}
    )
    options, refine_options, ratio_options = (
        dict(asked.options),
        dict(asked.refine_options),
        dict(asked.ratio_options),
    )
    rank_options = dict(asked.rank_options)
    owners = {"": options, "ratios": ratio_options, "ranks": rank_options} | (
        {asked.refine: refine_options} if asked.refine else {}
    )
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        owner, dot, own_name = name.strip().rpartition(".")
        if not equals or not own_name:
            raise UsageError(f"--set {assignment!r} is not of the form name=value")
        if owner not in owners or (dot and not owner):
            raise UsageError(
                f"--set {assignment!r} is for {owner!r}, but --refine is "
                f"{asked.refine or 'not given'}"
            )
        owners[owner][own_name] = text.strip()
    return replace(
        asked,
        options=options,
        refine_options=refine_options,
        ratio_options=ratio_options,
        rank_options=rank_options,
    )


def check_options(
    owner: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """`options` checked against the keyword-only parameters of `function`, text turned into their
    types.

    Raises:
        UsageError: unknown name or wrong type.
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    checked = {}
    for name, value in options.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise UsageError(
                f"{owner} has no option {name!r}; its options: "
                f"{names}{did_you_mean(name, list(known))}"
            )
        checked[name] = _typed(f"{owner} option {name}", value, known[name])
    return checked


def _typed(what: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`; numbers and booleans may be given as text."""
    kind = type(default)
    if kind is bool:
        truth = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, str) and value.lower() in truth:
            return truth[value.lower()]
    elif (
        kind in (int, float)
        and not isinstance(value, bool)
        and isinstance(value, str | int | float)
    ):
        try:
            number = kind(value)
        except ValueError:
            number = None
        if (
            number is not None
            and (isinstance(value, str) or number == value)
            and number - number == 0
        ):  # finite
            return number
    if type(value) is kind:
        return value
    raise UsageError(
        f"{what} is {value!r}; a value of type {kind.__name__} is expected, such as {default!r}"
    )


def _check_type(name: str, value: Any, annotation: str) -> None:
    kinds = {"str": str, "int": int, "bool": bool, "list[str]": list, "dict[str, Any]": dict}
    kind = kinds[annotation]
    right = type(value) is kind and (
        kind is not list or all(isinstance(item, str) for item in value)
    )
    if not right:
        raise UsageError(
            f"{name.replace('_', '-')} is {value!r}; a value of type {annotation} is expected"
        )


def _one_of(name: str, value: str, accepted: list[str]) -> None:
    if value not in accepted:
        raise UsageError(
            f"{name} is {value!r}; accepted: {', '.join(accepted)}{did_you_mean(value, accepted)}"
        )

"""The plan of a run as a file: what every linear becomes. TOML, one line a linear, made to be read
and edited.

    version = 1

    [linears]
    "model.layers.0.self_attn.q_proj" = { zeros = 8192 }  # 50.00% of 128×128
    "model.layers.0.self_attn.k_proj" = { pattern = "2:4" }
    "model.layers.0.self_attn.o_proj" = { rank = 32 }  # factors of 50.00% of 128×128
    "model.layers.0.self_attn.v_proj" = { dense = true }
    "*.mlp.*" = { keep = "60%" }

`zeros` is met exactly, `keep` is a rank: the largest whose factors have no more than this part of
the parameters. Every linear of the decoder blocks has an entry, no other name does. A glob is the
entry of those that have none of their own; the first that matches counts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from compressor.allocation.rank import largest_rank, rank_keeping
from compressor.checkpoint.atomic import write_output
from compressor.engine.task import Rank, Target
from compressor.errors import OutputError, UsageError, did_you_mean
from compressor.pattern import Pattern, parse_fraction

if TYPE_CHECKING:
    from compressor.allocation.choice import Choice
    from compressor.engine.plan import Plan
    from compressor.model.linear import Linear

FILE = "plan.toml"
_LARGEST = 1 << 24  # bytes of a plan that is read: a hundred thousand linears
_KINDS = (
    'accepted: { pattern = "2:4" }, { zeros = N }, { rank = K }, { keep = "60%" } or { dense = '
    "true }"
)

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PlanFile:
    """What every linear becomes.

    Attributes:
        linears: entry of every linear of the decoder blocks, by name, as the file has it:
            `{"pattern": "2:4"}`, `{"zeros": 8192}`, `{"rank": 32}` or `{"dense": True}`.
        measured: what the choice was made by; empty where nothing was measured.
        text: the file.
    """

    linears: Entries
    measured: dict[str, Any]
    text: str

    @classmethod
    def of(cls, choice: Choice) -> Self:
        """The file of targets that were chosen."""
        text = dumps(choice.plan)
        return cls(tomllib.loads(text)["linears"], choice.measured, text)

    def save(self, path: Path) -> None:
        """Write the file, which must not exist. Raises OutputError."""
        check_new_file(path)
        write_output(path, self.text.encode())


def check_new_file(path: Path) -> None:
    """Raise OutputError where a file of this name cannot be made."""
    if path.exists():
        raise OutputError(f"{path} exists already")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"the folder of {path} does not exist")


def dumps(plan: Plan) -> str:
    """The text of a plan file for `plan`, comments and all."""
    targets = {task.linear.name: task.target for task in plan.every}
    reasons = {left.name: left.reason for left in plan.left_dense}
    lines = [
        f"# What every linear becomes. Edit it, then: compress {_command(plan)} MODEL -o OUT "
        f"--plan THIS",
        "version = 1",
        "",
        "[linears]",
    ]
    for index in range(len(plan.skeleton.blocks)):
        lines += [
            f"{_quoted(linear.name)} = "
            f"{_entry(targets.get(linear.name), linear, reasons.get(linear.name, ''))}"
            for linear in plan.skeleton.linears(index)
        ]
    return "\n".join(lines) + "\n"


def _command(plan: Plan) -> str:
    return "lowrank" if any(isinstance(task.target, Rank) for task in plan.every) else "prune"


def _quoted(name: str) -> str:
    """A TOML key."""
    import tomli_w

    return tomli_w.dumps({"k": name}).removeprefix("k = ").strip()


def _entry(target: Target | None, linear: Linear, reason: str) -> str:
    rows, columns = linear.shape
    if target is None:
        return "{ dense = true }" + f"  # {' '.join(reason.split())}" * bool(reason)
    if isinstance(target, Rank):
        kept = target * (rows + columns) / (rows * columns)
        return f"{{ rank = {target} }}  # factors of {kept:.2%} of {rows}×{columns}"
    if target.zeros is not None:
        return f"{{ zeros = {target.zeros} }}  # {float(target.sparsity):.2%} of {rows}×{columns}"
    return f'{{ pattern = "{target}" }}'


def read(path: Path) -> Entries:
    """The entries of a plan file, their form checked but not whether they fit a model.

    Raises:
        UsageError: the file cannot be read, or is no plan.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(
                f"plan {path} has {path.stat().st_size} bytes; a plan has one short line for each "
                f"linear"
            )
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"plan {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"plan {path} is not readable TOML: {str(error)[:200]}") from None
    if type(content.get("version")) is not int or content["version"] != 1:
        raise UsageError(
            f"plan {path} has version {str(content.get('version'))[:50]!r}; version = 1 is accepted"
        )
    if unknown := set(content) - {"version", "linears"}:
        raise UsageError(
            f"plan {path} has an unknown key {min(unknown)[:100]!r}; known: version, linears"
        )
    entries = content.get("linears")
    if not isinstance(entries, dict) or not entries:
        raise UsageError(f"plan {path} has no [linears]")
    for name, entry in entries.items():
        _check_entry(path, name, entry)
    return entries


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """Raise UsageError where an entry is none of the known kinds."""
    kinds = {"pattern": str, "zeros": int, "rank": int, "keep": str, "dense": bool}
    kind = next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else ""
    if kind not in kinds or type(entry[kind]) is not kinds[kind] or entry == {"dense": False}:
        raise UsageError(
            f"plan {path}: the entry of {name[:100]!r} is {str(entry)[:100]}; {_KINDS}"
        )
    if kind in ("pattern", "keep"):
        try:
            Pattern.parse(entry[kind]) if kind == "pattern" else parse_fraction(kind, entry[kind])
        except UsageError as error:
            raise UsageError(f"plan {path}: {name[:100]!r}: {error}") from None


def patterns(entries: Entries) -> list[Pattern]:
    """The different patterns of a plan; a half stands for all numbers of zeros."""
    texts = [
        entry.get("pattern", "50%")
        for entry in entries.values()
        if not {"dense", "rank", "keep"} & set(entry)
    ]
    return [Pattern.parse(text) for text in dict.fromkeys(texts)]


def fit(
    entries: Entries, linears: Sequence[Linear], dense: Mapping[str, str]
) -> dict[str, Target | None]:
    """The target of every linear: a pattern, a rank, or None for one that stays dense.

    Args:
        entries: of a plan.
        linears: that may be compressed.
        dense: linears that stay dense whatever the plan says, and why.

    Raises:
        UsageError: a linear without an entry, a name that is none, zeros, a rank or a pattern that
            a linear cannot have.
    """
    names = {linear.name: linear for linear in linears}
    others = {linear.path: linear.name for linear in linears if linear.path}
    entries = {others.get(name, name): entry for name, entry in entries.items()}
    entries = _named(entries, names, dense)
    for name, entry in entries.items():
        if name in dense and "dense" not in entry:
            raise UsageError(
                f"the plan has a goal for {name}, which stays dense ({dense[name]}); make one of "
                f"the two agree"
            )
        if name not in names and name not in dense:
            raise UsageError(
                f"the plan names {name[:100]!r}, which is no linear of this "
                f"model{did_you_mean(name, list(names))}"
            )
    if missing := [name for name in names if name not in entries]:
        raise UsageError(
            f"the plan lacks {len(missing)} linears of this model, {missing[0]} among them; leave "
            f"one out as {{ dense = true }}"
        )
    return {name: _target(entries[name], linear) for name, linear in names.items()}


def _named(entries: Entries, names: Collection[str], dense: Mapping[str, str]) -> Entries:
    """The entries with globs replaced by the names they are for. Raises UsageError where one
    matches nothing.
    """
    globs = {name: entry for name, entry in entries.items() if set(name) & set("*?[")}
    named = {name: entry for name, entry in entries.items() if name not in globs}
    for glob, entry in globs.items():
        if not any(fnmatchcase(name, glob) for name in (*names, *dense)):
            example = next(iter(names))
            raise UsageError(
                f"the plan's {glob[:100]!r} matches no linear; names look like {example!r}"
            )
        named |= {name: entry for name in names if name not in named and fnmatchcase(name, glob)}
    return named


def _target(entry: Mapping[str, Any], linear: Linear) -> Target | None:
    if "rank" in entry:
        most = largest_rank(linear.shape)
        if not 1 <= entry["rank"] <= most:
            raise UsageError(
                f"the plan asks for rank {entry['rank']} of {linear.name}; factors are smaller "
                f"than it from rank 1 to {most}"
            )
        return Rank(entry["rank"])
    if "keep" in entry:
        if not (rank := rank_keeping(linear.shape, parse_fraction("keep", entry["keep"]))):
            raise UsageError(
                f"the plan keeps {entry['keep']} of {linear.name}, which has {linear.size} "
                f"weights: that is less than rank 1"
            )
        return Rank(rank)
    if "pattern" in entry:
        pattern = Pattern.parse(entry["pattern"])
        pattern.check_width(linear.name, linear.shape[1])
        return pattern
    zeros = entry.get("zeros", 0)
    if not 0 <= zeros <= linear.size:
        raise UsageError(
            f"the plan asks for {zeros} zeros in {linear.name}, which has {linear.size} weights"
        )
    return Pattern.exact(zeros, linear.size) if zeros else None

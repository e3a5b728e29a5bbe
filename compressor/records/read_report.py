"""What a page is made from: report.json and the files beside the folder, every value checked, for
files are not to be trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor import text
from compressor.checkpoint.digest import checkpoint_digest
from compressor.checkpoint.reader import Reader, read_json
from compressor.errors import CheckpointError
from compressor.formats import FORMATS
from compressor.formats.dense import Dense
from compressor.records.scores import arrow, metrics, read_scores, scores_path

_LONGEST_RECIPE = 1 << 16


@dataclass(frozen=True)
class Row:
    """One compressed linear. `block` is None outside the blocks; `part` is its name inside, numbers
    of experts as `*`.

    `sparsity` is None where the form has no zeros. `loss` is the relative loss its method arrived
    at as a fraction of that it started from, where it says so.
    """

    name: str
    block: int | None
    part: str
    shape: list[int]
    format: str
    sparsity: float | None
    error: float | None
    held_out_error: float | None
    loss: float | None
    rank: int | None
    dense_bytes: int
    bytes: int


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one linear, or the mean of the experts of a block, at some places from 0
    to `full` - 1.

    `rank` is the mean of those factored, None where there is none; factors pay up to
    `largest_rank`.
    """

    block: int
    part: str
    full: int
    rank: float | None
    largest_rank: int
    points: list[tuple[int, float]]


@dataclass(frozen=True)
class Score:
    """One number of an evaluation, with that of the baseline where there is one."""

    task: str
    metric: str
    better: str
    value: float
    before: float | None


@dataclass(frozen=True)
class Record:
    """Everything a page says.

    Attributes:
        recipe: of report.json; `recipe_text` is recipe.toml, empty without.
        rows: the compressed linears.
        block_errors: relative squared error of each block's output; empty without calibration.
        kept: fraction of the parameters of the linears, where ranks were shared out.
        spectra: those that ranks were chosen from, if they were measured.
        left_dense: reason -> (name, shape) of each weight that was left alone.
        run: device, seconds, block_seconds and peak_memory, from beside the folder; empty without.
        scores: the stored evaluation; `notes` says why there is none where one was found.
    """

    name: str
    recipe: dict[str, Any]
    recipe_text: str
    architecture: str
    parameters: int
    input_bytes: int
    output_bytes: int
    dense_bytes: int
    bytes: int
    calibration_tokens: int
    rows: list[Row]
    block_errors: dict[int, float]
    kept: float | None
    spectra: list[Spectrum]
    left_dense: dict[str, list[tuple[str, list[int]]]]
    versions: dict[str, str]
    run: dict[str, Any]
    scores: list[Score]
    notes: list[str]


def read_record(folder: Path) -> Record:
    """The record of a folder that `compress prune` or `compress lowrank` made. Weights are not
    read.

    Raises:
        CheckpointError: there is no report, or it is no report of this package.
    """
    path = folder / "report.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no report.json: `compress prune` and `compress lowrank` write one into "
            f"the folders they make"
        )
    found = _Checked(path, read_json(path))
    totals = found.inside("totals")
    beside = folder.resolve()
    output_bytes = found.whole("output_bytes")
    scores, notes = _scores(folder)
    recipe = found.get("recipe", dict)
    left: dict[str, list[tuple[str, list[int]]]] = {}
    for entry in found.entries("left_dense"):
        left.setdefault(entry.get("reason", str), []).append(
            (entry.get("name", str), entry.shape())
        )
    return Record(
        name=beside.name,
        recipe=recipe,
        recipe_text=_recipe_text(folder / "recipe.toml"),
        architecture=found.get("architecture", str),
        parameters=found.whole("parameters"),
        input_bytes=found.whole("input_bytes"),
        output_bytes=output_bytes,
        dense_bytes=totals.whole("dense_bytes"),
        bytes=totals.whole("bytes"),
        calibration_tokens=found.whole("calibration_tokens"),
        rows=[_row(entry) for entry in found.entries("linears")],
        block_errors={
            entry.whole("index"): entry.real("error")
            for entry in found.entries("blocks")
            if entry.found.get("error") is not None
        },
        kept=_kept(found.found.get("allocation")),
        spectra=[
            spectrum for entry in found.entries("spectra", []) if (spectrum := _spectrum(entry))
        ],
        left_dense=left,
        versions={str(key): str(value) for key, value in found.get("versions", dict).items()},
        run=_run(beside.with_name(f"{beside.name}.report.json"), found.found),
        scores=scores,
        notes=notes,
    )


@dataclass(frozen=True)
class _Checked:
    """A JSON object that gives values of the kind asked for, or says that the file is no report."""

    path: Path
    found: Mapping[str, Any]

    def refuse(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is no report of this package: {key!r} is missing or of another kind than "
            f"expected"
        )

    def get(self, key: str, kind: type) -> Any:
        value = self.found.get(key)
        if not isinstance(value, kind):
            raise self.refuse(key)
        return value

    def whole(self, key: str) -> int:
        value = self.found.get(key)
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise self.refuse(key)
        return value

    def real(self, key: str) -> float:
        value: Any = self.found.get(key)
        if not is_number(value) or value < 0:
            raise self.refuse(key)
        return float(value)

    def inside(self, key: str) -> _Checked:
        return _Checked(self.path, self.get(key, dict))

    def entries(self, key: str, default: list[Any] | None = None) -> list[_Checked]:
        """The objects in a list; `default` where there is no such key."""
        values = default if default is not None and key not in self.found else self.get(key, list)
        if not all(isinstance(value, dict) for value in values):
            raise self.refuse(key)
        return [_Checked(self.path, value) for value in values]

    def shape(self) -> list[int]:
        shape = self.get("shape", list)
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in shape):
            raise self.refuse("shape")
        return shape


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) < 1e300


def _row(entry: _Checked) -> Row:
    name, shape, described = entry.get("name", str), entry.shape(), entry.get("entry", dict)
    form = FORMATS.get(entry.get("format", str), Dense)  # of a newer version: shown as it is called
    try:
        form.check_entry(described, (shape[0], shape[1]))
    except (ValueError, IndexError):
        raise entry.refuse("entry") from None
    zeros, rank = entry.real("sparsity"), described.get("rank")
    block, part = text.place(name)
    return Row(
        name=name,
        block=block,
        part=part,
        shape=shape,
        format=entry.get("format", str),
        sparsity=zeros if form.SPARSE else None,
        error=None if entry.found.get("error") is None else entry.real("error"),
        held_out_error=(
            None if entry.found.get("held_out_error") is None else entry.real("held_out_error")
        ),
        loss=_fraction(entry.found.get("losses")),
        rank=rank if type(rank) is int and 0 <= rank < 1 << 31 else None,
        dense_bytes=entry.whole("dense_bytes"),
        bytes=entry.whole("bytes"),
    )


def _kept(allocation: Any) -> float | None:
    if not isinstance(allocation, dict):
        return None
    kept: Any = allocation.get("parameters")
    dense: Any = allocation.get("dense_parameters")
    return (
        kept / dense
        if is_number(kept) and is_number(dense) and 0 <= kept <= dense and dense > 0
        else None
    )


def _spectrum(entry: _Checked) -> Spectrum | None:
    """None for a linear outside the blocks."""
    index, values, full = (
        entry.get("index", list),
        entry.get("values", list),
        min(entry.shape(), default=0),
    )
    if (
        not index
        or len(index) != len(values)
        or not all(type(place) is int and 0 <= place < full for place in index)
    ):
        raise entry.refuse("index")
    if not all(is_number(value) and value >= 0 for value in values):
        raise entry.refuse("values")
    rank = None if entry.found.get("rank") is None else entry.real("rank")
    if rank is not None and not 1 <= rank <= full:
        raise entry.refuse("rank")
    points = sorted(zip(index, map(float, values), strict=True))
    part, largest = entry.get("linear", str), entry.whole("largest_rank")
    return (
        None
        if entry.found.get("block") is None
        else Spectrum(entry.whole("block"), part, full, rank, largest, points)
    )


def _fraction(losses: Any) -> float | None:
    """What is left of the loss a method started from."""
    pair = isinstance(losses, list) and len(losses) == 2 and all(map(is_number, losses))
    return losses[1] / losses[0] if pair and losses[0] > 0 and losses[1] >= 0 else None


def _recipe_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:_LONGEST_RECIPE].strip()
    except OSError:
        return ""


def _run(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the run cost; nothing where the file beside the folder is missing or is about another
    one.
    """
    try:
        found = read_json(path)
    except CheckpointError:
        return {}
    run = found.pop("run", None)
    if not isinstance(run, dict) or json.dumps(found, sort_keys=True) != json.dumps(
        dict(facts), sort_keys=True
    ):
        return {}
    seconds, peak = run.get("block_seconds"), run.get("peak_memory")
    return {
        "device": str(run.get("device", "")),
        "seconds": float(run["seconds"]) if is_number(run.get("seconds")) else 0.0,
        "block_seconds": [float(value) for value in seconds]
        if isinstance(seconds, list) and all(map(is_number, seconds))
        else [],
        "peak_memory": {str(key): value for key, value in peak.items() if is_number(value)}
        if isinstance(peak, dict)
        else {},
    }


def _scores(folder: Path) -> tuple[list[Score], list[str]]:
    """The evaluation that is stored beside the folder, if it is of these very weights."""
    path = scores_path(folder)
    if not path.is_file():
        return [], []
    found = read_scores(folder, checkpoint_digest(Reader(folder)))
    if found is None:
        return [], [
            f"{path.name} was left out: it is about another checkpoint. Run compress eval again."
        ]
    baseline: Any = found.get("baseline")
    known = isinstance(baseline, dict) and isinstance(baseline.get("results"), dict)
    before = {(task, metric): value for task, metric, value in metrics(baseline)} if known else {}
    return [
        Score(task, metric, arrow(found, task, metric), value, before.get((task, metric)))
        for task, metric, value in metrics(found)
    ], []

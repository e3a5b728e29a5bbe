"""All scores of one model or of many, in lm-eval's schema.

Every number is kept by what it was made from: the model's bytes, the tokens or the task's
documents, the settings, the versions. So an evaluation that was interrupted goes on where it was,
and one with a further model or task computes that one only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.calibration.dataset import check_dataset, has_columns
from compressor.checkpoint import cache
from compressor.errors import UsageError
from compressor.evaluation import lmeval
from compressor.evaluation.candidate import Candidate, Text, own_text
from compressor.evaluation.rounded import Calibration, Rounded, rounded_candidates
from compressor.evaluation.speed import measure_speed
from compressor.evaluation.windows import DIVERGENCE, METRIC, Sums, score_windows
from compressor.free_memory import free_memory
from compressor.records.report import versions
from compressor.records.scores import BY_TASK, label, metrics, store_scores
from compressor.text import home_path, size

_SCHEME = 1  # of what is cached; counts up when the meaning of a number changes


class Progress(Protocol):
    """Told after each step: its name, how many are done of how many."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Called after each step."""
        ...


@dataclass(frozen=True)
class Settings:
    """What is measured and how, the same for all models.

    Attributes:
        datasets: see `compressor.calibration.dataset`; `self` is text that the baseline (or the
            model) writes with `seed`.
        text_column: field that has the text or the chat, of those datasets that have fields.
        tasks: names of lm-eval tasks; `include_path` holds further task files and then no others
            are scanned for.
        divergence: whether the KL divergence from the baseline is taken where there is one.
        seq_len: window of the perplexity; 0 stands for min(2048, the model's limit).
        num_samples: sequences of `self`.
        limit: at most so many rows, and examples per task.
        batch_size: of the tasks. It is no part of what a result is known by: a run that ran out of
            memory goes on with less.
        rounded: of `GRIDS`: the baseline with its linears rounded to these is scored as well.
        calibration, calibration_samples: the text of GPTQ among them, and its rows of a window
            each. `self` is text that the baseline writes, other than that of `datasets`.
        cached: whether numbers that are known are taken from the cache.
    """

    datasets: Sequence[str] = ()
    text_column: str = ""
    tasks: Sequence[str] = ()
    include_path: Path | None = None
    divergence: bool = True
    seq_len: int = 0
    num_samples: int = 32
    seed: int = 1
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    trust_remote_code: bool = False
    rounded: Sequence[str] = ()
    calibration: str = "self"
    calibration_samples: int = 128
    cached: bool = True
    progress: Progress = field(default=lambda step, done, total: None, compare=False)
    note: Callable[[str], None] = field(default=lambda text: None, compare=False)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("seq_len", self.seq_len or 2, 2),
            ("num_samples", self.num_samples, 1),
            ("limit", 1 if self.limit is None else self.limit, 1),
            ("num_fewshot", self.num_fewshot or 0, 0),
            ("seed", self.seed, 0),
            ("batch_size", self.batch_size, 1),
            ("calibration_samples", self.calibration_samples, 1),
        ):
            if value < least or value >= 1 << 63:
                raise UsageError(f"`{name}` is {value}; accepted: {least} or more")
        for dataset in self.datasets:
            check_dataset(dataset, self.column_of(dataset))
        texts = [*self.datasets, *([self.calibration] if self.rounded else [])]
        if self.rounded:
            check_dataset(self.calibration, self.column_of(self.calibration))
        if self.text_column and not any(map(has_columns, texts)):
            raise UsageError(
                f"`text_column` {self.text_column!r} is for .jsonl, .parquet and Hub datasets; "
                "`dataset` names none"
            )

    def column_of(self, dataset: str) -> str:
        """The text column of `dataset`, empty for the usual ones."""
        return self.text_column if has_columns(dataset) else ""

    def name_of(self, dataset: str) -> str:
        """What a data set is called in the results: its file's name, or all of it where two have
        the same.
        """
        stem = "self" if dataset == "self" else Path(dataset).stem
        alone = sum(Path(other).stem == stem for other in dict.fromkeys(self.datasets)) == 1
        return stem if alone else dataset

    def rounded_of(self, original: Candidate) -> list[Rounded]:
        """`original` on the grids that are asked for."""
        calibration = Calibration(
            self.calibration,
            self.column_of(self.calibration),
            self.calibration_samples,
            original.window(self.seq_len),
            0 if self.seed else 1,  # of the calibration of a run, and not of `self` as it is scored
        )
        return list(rounded_candidates(original, self.rounded, calibration, self.progress))

    def candidate(self, model: str) -> Candidate:
        """`model`, to be run as these settings say."""
        return Candidate(model, self.device, self.dtype, self.trust_remote_code)


def evaluate(model: str, *, baseline: str | None = None, **settings: Any) -> dict[str, Any]:
    """Score one model, a folder or Hub id, plain or compressed; `settings` are the fields of
    `Settings`.

    Args:
        baseline: the model it is compared with: it writes the text of `self`, and the KL divergence
            is taken from it.

    Returns:
        A dictionary in lm-eval's schema: `results`, `configs`, `versions`, `n-samples`, `config`, …

    Raises:
        CompressError: one clear line.
    """
    asked = Settings(**settings)
    lmeval.check_tasks(asked.tasks, asked.include_path)
    return _evaluate(asked.candidate(model), asked.candidate(baseline) if baseline else None, asked)


def evaluate_all(
    models: Sequence[str], *, baseline: str | None = None, **settings: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Score the baseline and then `models`, each yielded with its name as soon as it is done, as
    `evaluate` returns it.

    The scores of a model that is a local folder are stored beside it (`compressor.records.scores`),
    the baseline's among them. Those of the baseline rounded come after its own, and are not stored.
    """
    asked = Settings(**settings)
    lmeval.check_tasks(asked.tasks, asked.include_path)
    # all of them are there before the first is scored
    candidates = [asked.candidate(name) for name in dict.fromkeys(models)]
    original = asked.candidate(baseline) if baseline else None
    rounded = asked.rounded_of(original) if original else []
    before = _evaluate(original, None, asked) if original else None
    if original and before:
        # for the divergence it is loaded once more, if both models fit; tasks need one model only
        original.free()
        yield original.name, before
    for candidate in [*rounded, *candidates]:
        if before is not None and candidate.name == baseline:
            continue
        found = _evaluate(candidate, original, asked)
        if not isinstance(candidate, Rounded) and home_path(candidate.name).is_dir():
            _store(candidate, found, before, asked)
        yield candidate.name, found
        candidate.free()


def _store(
    candidate: Candidate,
    found: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    asked: Settings,
) -> None:
    if before is not None:
        kept = {key: before[key] for key in (*BY_TASK, "digest", "model_name", "config")}
        found = {**found, "baseline": kept}
    try:
        store_scores(candidate.folder, found)
    except OSError as error:
        asked.note(
            f"the scores could not be stored beside {candidate.name}: {error.strerror or error}"
        )


def _evaluate(candidate: Candidate, original: Candidate | None, asked: Settings) -> dict[str, Any]:
    started = time.perf_counter()
    candidate.window(asked.seq_len)
    for text in candidate.reader.notes:
        asked.note(f"{candidate.name}: {text}")
    found: dict[str, Any] = {key: {} for key in BY_TASK}
    for task in asked.tasks:
        scored = _score_task(candidate, task, asked)
        for key in (*BY_TASK, "groups", "group_subtasks"):
            found.setdefault(key, {}).update(scored.get(key) or {})
        found.update({key: value for key, value in scored.items() if key not in found})
    for dataset in asked.datasets:
        for key, value in _score_dataset(candidate, original, dataset, asked).items():
            found[key][asked.name_of(dataset)] = value
    if asked.device.startswith("cuda") and not isinstance(candidate, Rounded):
        parts = _identity(candidate, asked)
        found["speed"] = _known(
            asked, "speed", parts, lambda: measure_speed(candidate.model, limit=candidate.limit)
        )
    found["config"] = {
        "model": "compress-llm",
        "model_args": {"pretrained": candidate.name},
        "limit": asked.limit,
        "num_fewshot": asked.num_fewshot,
        "seed": asked.seed,
        "dtype": _dtype(candidate),
        "device": asked.device,
        "model_bytes": candidate.nbytes,
        "linear_bytes": candidate.linear_bytes,
    }
    found |= {"model_name": candidate.name, "digest": candidate.digest, "versions_of": versions()}
    found["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    found["total_evaluation_time_seconds"] = round(time.perf_counter() - started, 3)
    return found


def _dtype(candidate: Candidate) -> str:
    """What the model computes in."""
    if candidate.dtype != "auto":
        return candidate.dtype
    return str(candidate.config.dtype or candidate.model.dtype).removeprefix("torch.")


def _identity(candidate: Candidate, asked: Settings) -> list[Any]:
    """What every number of a model depends on."""
    device = (
        torch.cuda.get_device_name(asked.device)
        if asked.device.startswith("cuda")
        else asked.device
    )
    return [_SCHEME, candidate.digest, device, asked.dtype, versions()]


def _known(
    asked: Settings, kind: str, parts: list[Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The cached result that `parts` name, or what `compute` gives, cached from now on."""
    key = cache.make_key(kind, *parts)
    known = cache.load(kind, key) if asked.cached else None
    if known is None:
        known = compute()
        cache.save(kind, key, known)
    return known


def _score_task(candidate: Candidate, task: str, asked: Settings) -> dict[str, Any]:
    asked.progress(task, 0, 1)
    parts = [
        *_identity(candidate, asked),
        task,
        lmeval.task_digest(task, asked.include_path),
        asked.limit,
        asked.num_fewshot,
    ]
    options: dict[str, Any] = {
        "include_path": asked.include_path,
        "limit": asked.limit,
        "num_fewshot": asked.num_fewshot,
        "batch_size": asked.batch_size,
        "trust_remote_code": asked.trust_remote_code,
        "progress": lambda done, total: asked.progress(task, done, total),
    }
    scored = _known(
        asked,
        "task",
        parts,
        lambda: lmeval.run_task(candidate.model, candidate.folder, task, **options),
    )
    asked.progress(task, 1, 1)
    for found, metric, value in metrics(scored):
        asked.note(f"{candidate.name}: {found} {label(metric)} {value:.4g}")
    return scored


def _score_dataset(
    candidate: Candidate, original: Candidate | None, dataset: str, asked: Settings
) -> dict[str, Any]:
    """The entries of one data set under each key of `BY_TASK`."""
    name, window = asked.name_of(dataset), candidate.window(asked.seq_len)
    text = text_of(candidate, original, dataset, asked)
    against = (
        original if original and _comparable(candidate, original, dataset, text, asked) else None
    )
    parts = [*_identity(candidate, asked), text.key, against.digest if against else None]
    writer = original or candidate
    known = _known(
        asked, "windows", parts, lambda: _pass(candidate, against, name, text, writer, parts, asked)
    )
    sums = Sums.read(known) or Sums(**_pass(candidate, against, name, text, writer, parts, asked))
    asked.progress(name, sums.done, sums.done)
    values = {"alias": name, METRIC: sums.perplexity}
    if against:
        values[DIVERGENCE] = sums.divergence / sums.tokens
    shown = ", ".join(
        f"{label(metric)} {value:.4g}" for metric, value in values.items() if metric != "alias"
    )
    asked.note(f"{candidate.name}: {name} {shown}")
    return {
        "results": values,
        "configs": {
            "task": name,
            "dataset_path": dataset,
            "output_type": "token_perplexity",
            "window": window,
        },
        "versions": 1,
        "n-shot": 0,
        "higher_is_better": {"token_perplexity": False, "kl_divergence": False},
        "n-samples": {"original": text.total, "effective": sums.done},
    }


def text_of(
    candidate: Candidate, original: Candidate | None, dataset: str, asked: Settings
) -> Text:
    """The rows to score. Those of `self` are named by who writes them: they are written only if
    they have to be scored.
    """
    if dataset != "self":
        column, note = asked.column_of(dataset), asked.note
        return candidate.text(dataset, asked.seq_len, asked.limit, text_column=column, note=note)
    writer, window = original or candidate, candidate.window(asked.seq_len)
    by = [
        writer.digest,
        window,
        asked.num_samples,
        asked.seed,
        asked.device,
        asked.limit,
        versions(),
    ]
    return Text([], cache.make_key("self", *by), asked.num_samples)


def rows_of(candidate: Candidate, text: Text, writer: Candidate, asked: Settings) -> list[Tensor]:
    """The rows of `text`; those of `self` are written by `writer` here, if they have not been."""
    how = (asked.num_samples, asked.seed, asked.device, asked.trust_remote_code)
    rows = text.rows or own_text(writer.name, candidate.window(asked.seq_len), *how)
    return rows[: asked.limit]


def _comparable(
    candidate: Candidate, original: Candidate, dataset: str, text: Text, asked: Settings
) -> bool:
    """Whether the divergence from `original` on this text is asked for and can be had; a note says
    why not.
    """
    if not asked.divergence:
        return False
    reason = ""
    if candidate.vocab_size != original.vocab_size:
        reason = f"it has {candidate.vocab_size} tokens, {original.name} has {original.vocab_size}"
    elif (
        original.window(0) < candidate.window(asked.seq_len)
        or text_of(original, original, dataset, asked).key != text.key
    ):
        reason = f"{original.name} reads {dataset} as other windows"
    else:
        needed = sum(model.loaded_bytes for model in (candidate, original) if not model.loaded)
        free = (
            torch.cuda.mem_get_info(asked.device)[0]
            if asked.device.startswith("cuda")
            else free_memory()
        )
        if needed * 1.1 > free:
            original.free()
            reason = f"both models in memory take {size(needed)} more, {size(free)} are free"
    if reason:
        asked.note(f"no KL divergence of {candidate.name} on {asked.name_of(dataset)}: {reason}")
    return not reason


def _pass(
    candidate: Candidate,
    against: Candidate | None,
    name: str,
    text: Text,
    writer: Candidate,
    parts: list[Any],
    asked: Settings,
) -> dict[str, Any]:
    """Score the rows of `text`, from where an earlier pass was interrupted; the sums."""
    key = cache.make_key("windows", *parts)
    asked.progress(name, 0, 1)
    sums = score_windows(
        candidate.model,
        rows_of(candidate, text, writer, asked),
        baseline=against.model if against else None,
        start=Sums.read(cache.load("partial", key)) if asked.cached else None,
        save=lambda sums: cache.save("partial", key, sums),
        progress=lambda done, total: asked.progress(name, done, total),
    )
    cache.forget("partial", key)
    if against:  # what it says without the comparison is known now as well
        cache.save(
            "windows",
            cache.make_key("windows", *parts[:-1], None),
            vars(Sums(sums.done, sums.tokens, sums.loss)),
        )
    return vars(sums)

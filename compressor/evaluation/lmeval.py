"""Tasks of the lm-evaluation-harness, one at a time, so that what is done is done when a long run
is cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from compressor.calibration import tokens
from compressor.errors import DataError, UsageError


@lru_cache(maxsize=1)
def task_manager(include_path: Path | None) -> Any:
    """lm-eval's index of tasks; `include_path` holds further task files and then no others are
    scanned for.

    Raises:
        UsageError: lm-eval is not installed, or the path is no folder.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError("`tasks` needs lm-eval: pip install 'compress-llm[eval]'") from None
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"`include_path` {include_path} is not a folder")
    return TaskManager(
        include_path=str(include_path) if include_path else None,
        include_defaults=include_path is None,
    )


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Raise UsageError where a task is unknown or lm-eval is not there."""
    if tasks and (
        unknown := [task for task in tasks if task not in task_manager(include_path).all_tasks]
    ):
        raise UsageError(
            f"unknown task {unknown[0]!r}; `lm-eval ls tasks` lists the known ones, `include_path` "
            f"adds a folder of task files"
        )


@lru_cache
def task_digest(task: str, include_path: Path | None) -> str:
    """A SHA-256 over the definition of `task` and the documents it asks about. Raises DataError."""
    found = hashlib.sha256()
    with _readable(task):
        for leaf in _leaves(task_manager(include_path).load_task_or_group([task])):
            _update(found, leaf.dump_config())
            for document in leaf.eval_docs:
                _update(found, document)
            if (
                leaf.config.num_fewshot != 0
                and leaf.config.fewshot_split
                and leaf.config.fewshot_split in leaf.dataset
            ):
                for document in leaf.dataset[leaf.config.fewshot_split]:
                    _update(found, document)
    return found.hexdigest()


def _update(found: Any, value: Any) -> None:
    found.update(json.dumps(value, sort_keys=True, default=repr).encode())


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    for value in tasks.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value


def run_task(
    model: Any,
    folder: Path,
    task: str,
    *,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """lm-eval's results for one task or group, in its own schema. Raises DataError where its data
    cannot be had.

    Args:
        progress: told how many of how many requests are done.
    """
    import lm_eval
    from lm_eval.models import huggingface

    adapt: Any = (
        huggingface.HFLM
    )  # its decorators hide the parameters from type checkers, here and below
    run: Any = lm_eval.simple_evaluate
    length = tokens.context_length(model.config)
    tokenizer = tokens.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    adapter = adapt(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)
    _count(adapter, model.config.get_text_config().vocab_size, progress)
    with _readable(task):
        found = run(
            model=adapter,
            tasks=[task],
            task_manager=task_manager(include_path),
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=1000,
        )
    assert found is not None
    return json.loads(
        json.dumps({key: value for key, value in found.items() if key != "samples"}, default=str)
    )


def _count(adapter: Any, vocab_size: int, progress: Callable[[int, int], None]) -> None:
    """Have an adapter of lm-eval's tell `progress` of every batch, in place of its own bars, and
    check the ids of every batch, those of padding and of beginnings among them.
    """
    state = {"done": 0, "total": 1}

    def announced(ask: Callable[..., Any]) -> Callable[..., Any]:
        def run(requests: Any, **options: Any) -> Any:
            state.update(done=0, total=max(1, len(requests)))
            return ask(requests, **{**options, "disable_tqdm": True})

        return run

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(ids: Any = None, *rest: Any, **options: Any) -> Any:
            batch = options["context"] if ids is None else ids
            if (last := int(batch.max())) >= vocab_size:
                raise DataError(
                    f"the tokenizer gives id {last}, the model's vocabulary ends at "
                    f"{vocab_size - 1}: they do not belong together"
                )
            found = call(*(() if ids is None else (ids,)), *rest, **options)
            state["done"] += len(batch)
            progress(
                min(state["done"], state["total"]), state["total"]
            )  # requests of several windows count once for each
            return found

        return run

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(adapter, name, announced(getattr(adapter, name)))
    for name in ("_model_call", "_model_generate"):
        setattr(adapter, name, counted(getattr(adapter, name)))


@contextmanager
def _readable(task: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of the Hub, of files
        raise DataError(
            f"the data of {task} could not be read: {' '.join(str(error).split())[:300]}"
        ) from None

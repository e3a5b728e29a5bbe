"""Shared fixtures: tiny random models of many families, the model that ships with the demo, and the
optional canaries.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.families import build

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "books-1m"
SHARED = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["COMPRESS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def canaries() -> Path:
    if not (SHARED / "models").is_dir():
        pytest.skip("the canary models are not here; COMPRESS_SHARED names their folder")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function: family -> folder of a tiny random bf16 checkpoint in several shards."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family.replace(" ", "-")))
        return made[family]

    return make


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """Eight calibration rows of 32 ids below 128."""
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f'{{"input_ids": {row}}}\n' for row in ids.tolist()))
    return path


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run the command line in this process, as `main` would in its own; returns code, stdout and
    stderr.
    """
    from compressor.cli import main

    def run(*arguments: object, code: int = 0) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        ended = 0
        try:
            main()
        except SystemExit as end:
            ended = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        printed = capfd.readouterr()
        assert ended == code, f"exit {ended}, expected {code}\n{printed.out}\n{printed.err}"
        return SimpleNamespace(stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A packed output, as `compress prune tester/base` would leave it, with scores beside it."""
    from compressor.config.recipe import Recipe
    from compressor.run.pipeline import prune

    out = tmp_path_factory.mktemp("made") / "out"
    prune(Recipe(str(DEMO), method="magnitude"), out)
    (out / "recipe.toml").write_text(
        (out / "recipe.toml").read_text().replace(str(DEMO), "tester/base")
    )
    store(
        out,
        "books",
        "data/books.jsonl",
        {"token_perplexity,none": 121.9375, "token_perplexity_stderr,none": 0.5},
    )
    store(
        out,
        "arc_easy",
        "allenai/ai2_arc",
        {"acc,none": 0.25, "acc_norm,none": 0.5},
        dataset_name="ARC-Easy",
    )
    return out


def store(out, task, dataset, results, **config):
    """Store scores as `compress eval` does, those of the baseline half as high."""
    from compressor.checkpoint.digest import checkpoint_digest
    from compressor.checkpoint.reader import Reader
    from compressor.records.scores import store_scores

    def record(values):
        return {
            "results": {task: {"alias": task, **values}},
            "configs": {task: {"task": task, "dataset_path": dataset, **config}},
            "versions": {task: 1},
            "n-shot": {task: 0},
            "higher_is_better": {task: {"token_perplexity": False, "acc": True, "acc_norm": True}},
            "n-samples": {task: {"original": 9, "effective": 7}},
            "config": {"device": "cpu", "dtype": "float32"},
        }

    baseline = {**record({key: value / 2 for key, value in results.items()}), "digest": "b"}
    store_scores(
        out, {**record(results), "digest": checkpoint_digest(Reader(out)), "baseline": baseline}
    )


@pytest.fixture
def out(made, tmp_path):
    """A copy of `made`, to be changed."""
    from compressor.records.scores import scores_path

    shutil.copytree(made, tmp_path / "out")
    shutil.copy(scores_path(made), scores_path(tmp_path / "out"))
    return tmp_path / "out"

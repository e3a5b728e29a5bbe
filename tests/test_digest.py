"""A digest is the content of a checkpoint: not its place, not its records, every byte of its
weights.
"""

import json
import os
import shutil

from compressor.checkpoint.digest import checkpoint_digest
from compressor.checkpoint.reader import Reader
from compressor.records.scores import read_scores, scores_path, store_scores


def digest(folder):
    return checkpoint_digest(Reader(folder))


def test_content_and_nothing_else(tiny, tmp_path):
    first = digest(tiny("llama"))
    shutil.copytree(tiny("llama"), tmp_path / "copy")
    copy = tmp_path / "copy"
    assert digest(copy) == first
    (copy / "report.json").write_text("{}")
    (copy / "README.md").write_text("words")
    (copy / ".state.json").write_text("{}")
    assert digest(copy) == first
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    changed = digest(copy)
    assert changed != first
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert digest(copy) not in (first, changed)


def test_a_change_that_keeps_size_and_time_of_modification_is_seen(tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "copy")
    before = digest(tmp_path / "copy")
    shard = next((tmp_path / "copy").glob("*.safetensors"))
    times = shard.stat()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(tmp_path / "copy") != before


def record(task, value, digest, dtype="float32"):
    by_task = {
        key: {task: {}}
        for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples")
    }
    return {
        **by_task,
        "results": {task: {"acc,none": value}},
        "digest": digest,
        "config": {"dtype": dtype, "device": "cpu"},
    }


def test_scores_accumulate_by_task_for_the_same_bytes(tmp_path):
    out = tmp_path / "out"
    store_scores(out, {**record("a", 1.0, "x"), "baseline": record("a", 2.0, "d")})
    store_scores(out, {**record("b", 3.0, "x"), "baseline": record("b", 4.0, "d")})
    store_scores(out, record("a", 5.0, "x"))
    found = read_scores(out, "x")
    assert found["results"] == {"a": {"acc,none": 5.0}, "b": {"acc,none": 3.0}}
    assert found["baseline"]["results"] == {"a": {"acc,none": 2.0}, "b": {"acc,none": 4.0}}
    assert read_scores(out, "y") is None
    store_scores(out, record("b", 6.0, "y"))
    assert json.loads(scores_path(out).read_text())["results"] == {"b": {"acc,none": 6.0}}
    store_scores(out, record("a", 7.0, "y", "bfloat16"))
    assert read_scores(out, "y")["results"] == {"a": {"acc,none": 7.0}}
    assert list(tmp_path.iterdir()) == [scores_path(out)]

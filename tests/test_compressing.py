"""What benchmarks/compressing.py makes of its runs; nothing is measured here."""

import argparse
import json
import sys
from pathlib import Path

import compressing
import one_run
import pytest


def row(kind, what, user, *, rss=100, samples=16, repeat=0, **stages):
    work = sum(stages.values())
    return dict(
        kind=kind, what=what, samples=samples, seq_len=8, repeat=repeat, user=user, system=1.0,
        wall=user, peak_rss_mb=rss, peak_anonymous_mb=rss, work=work, stages=stages,
        io={"read_bytes": 3_000_000},
    )  # fmt: skip


ROWS = [
    row("forward", "bfloat16", 9, forward=4.0, other=0.5),
    row("compress", "wanda", 9, rss=60, forward=4.0, method=1.0),
    row("compress", "wanda", 19, rss=60, repeat=1, forward=14.0, method=1.0),
    row("peer", "wanda", 19, rss=100, other=15.0),
]


def test_the_ratio_is_that_of_the_best_runs():
    (said,) = compressing.ratios(ROWS)
    assert "2.00 x faster than llm-compressor" in said
    assert "0.60 x its peak RSS" in said
    assert "1.25 x the floor in bfloat16" in said
    assert "float32" not in said  # not measured


def test_the_table_has_a_line_for_everything_measured():
    _, _, *lines = compressing.table(ROWS)
    assert len(lines) == 3
    assert lines[1].startswith("| 16 | wanda | 9 | 1.0 | 9 | 60 | 60 | 3 | 0 | forward 80%, method")


def test_both_take_turns_at_being_first():
    arguments = argparse.Namespace(
        samples=[16], repeats=2, methods=["wanda", "armor"], against="llmcompressor"
    )
    kinds = [kind for kind, what, _, _ in compressing.runs(arguments) if what == "wanda"]
    assert kinds == ["compress", "peer", "peer", "compress"]
    assert ("peer", "armor") not in {run[:2] for run in compressing.runs(arguments)}


def test_time_of_a_stage_within_another_is_its_own(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(one_run.time, "process_time", lambda: next(clock))
    stages = one_run.Stages()
    with stages.stage("forward"), stages.stage("statistics"):
        pass
    assert stages.seconds == {"other": 1.0, "forward": 2.0 + 8.0, "statistics": 4.0}


def test_a_process_that_fails_is_shown(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)failed:.*no such thing"):
        compressing.measure([sys.executable, "-c", "raise OSError('no such thing')"], tmp_path)
    code = "from pathlib import Path; Path('run.json').write_text('{\"work\": 1}')"
    found = compressing.measure([sys.executable, "-c", code], tmp_path)
    assert found["work"] == 1
    assert found["peak_rss_mb"] > 0


def test_what_is_known_is_not_measured_again(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.jsonl"
    known = [ROWS[0], ROWS[1], row("forward", "float32", 9, forward=8.0)]
    results.write_text("".join(json.dumps(one) + "\n" for one in known))
    monkeypatch.setattr(compressing, "measure", lambda *_: pytest.fail("it was measured"))
    words = f"x m --dataset d --results {results} --methods wanda --repeats 1 --seq-len 8"
    monkeypatch.setattr(sys, "argv", words.split())
    compressing.main()
    assert "0.62 x the floor in float32" in capsys.readouterr().out
    assert Path(results).read_text().count("\n") == 3

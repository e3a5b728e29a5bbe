"""The protocol of docs/quality.md: every case is a command that parses, a row is measured once, and
the page is made of the rows.
"""

import json
import math

import pytest
from typer.main import get_command

from benchmarks import quality, quality_page
from compressor.cli import app

COMMANDS = get_command(app).commands


@pytest.fixture
def protocol(demo_model, rows):
    return quality.Protocol("books-1m", demo_model, rows, rows, 8, 32, 4)


@pytest.mark.parametrize("case", quality.CASES)
def test_a_case_is_a_command_line(case, protocol, tmp_path):
    command, *words = protocol.compress(case, tmp_path / "out")
    COMMANDS[command].make_context(command, list(words))
    assert set(quality.CASES[case].split()) <= {command, *words}


def test_rows_are_measured_once_and_a_failure_is_told(protocol, tmp_path, monkeypatch, capsys):
    results, work = tmp_path / "rows.jsonl", tmp_path / "work"
    work.mkdir()
    monkeypatch.setitem(quality.CASES, "broken", "prune --method wanda --set power=2")
    cases = ["2:4-magnitude", "broken"]
    assert quality.run(protocol, cases, results, work) == 1
    assert "books-1m broken: " in capsys.readouterr().err
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["case"] for row in found] == ["dense", *quality.ROUNDED, "2:4-magnitude"]
    dense, *rounded, pruned = found
    assert dense["bits"] == 16
    assert [row["bits"] for row in rounded] == pytest.approx([4.312, 4.312, 3.297, 3.297], abs=1e-3)
    assert pruned["bits"] == 9
    assert dense["kl"] == 0 < pruned["kl"]
    assert pruned["cpu_s"] > 0
    assert not list(work.iterdir())
    monkeypatch.setattr(quality, "compress", None)  # nothing is run any more
    assert quality.run(protocol, cases[:1], results, work) == 0
    assert len(results.read_text().splitlines()) == 6


def test_the_page_says_what_is_lost_against_sparsegpt_and_marks_what_is_flattered():
    def row(model, case, ppl, protocol="full"):
        return {
            "model": model, "protocol": protocol, "case": case, "command": f"prune {case}",
            "ppl": ppl, "kl": 0.5, "bits": 9.0, "cpu_s": 3.2, "machine": "a CPU", "torch": "2",
        }  # fmt: skip

    rows = [row("smollm2", "dense", 20.0), row("smollm2", "2:4-sparsegpt", 20 * math.e**2)]
    rows += [row("smollm2", "2:4-wanda", 20 * math.e**3), row("smollm2", "dense", 21.0, "quick")]
    page = quality_page.page([*rows, row("books-1m", "dense", 44.0)])
    assert "| 2:4-wanda | 401.7 | 1.50 | 0.5 | 9.00 | 3 | `prune 2:4-wanda` |" in page
    assert page.count("int4 rows flatter int4") == 2  # both protocols of SmolLM2
    assert "a quarter of the text" in page
    books = page.split("## books-1m")[1]
    assert "flatter" not in books
    assert "babyllama105" not in page


def test_a_model_that_is_not_here_is_left_out_with_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quality, "SHARED", tmp_path)
    monkeypatch.setattr("smollm2.find_spec", lambda name: None)
    assert list(quality.protocols(["books-1m", "smollm2"], None, False)) == []
    said = capsys.readouterr().err
    assert "books-1m is left out" in said
    assert "smollm2 is left out" in said

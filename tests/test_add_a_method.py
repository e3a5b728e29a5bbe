"""CONTRIBUTING's "Add a method", done: its file and its line in a copy of the package, then the
command line and the tests of all methods.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import DEMO, ROOT


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the package with the method in it; runs Python there."""
    copy = tmp_path_factory.mktemp("house")
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("compressor", "kernels", "recipes", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", copy)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## Add a method\n(.*?)^## ", text, re.M | re.S)[1]
    [(file, folder)] = re.findall(r"`(\w+\.py)` in `(compressor/\w+/)`", section)
    [table] = re.findall(r"`(compressor/\w+/\w+\.py)`", section)
    path = folder + file
    code, line = re.findall(r"^```(?:python)?\n(.*?)^```", section, re.M | re.S)
    assert not (copy / path).exists()
    (copy / path).write_text(code, encoding="utf-8")
    before = (copy / table).read_text(encoding="utf-8")
    after = re.sub(r"(METHODS = \[\n(?:    .*\n)*)\]", rf"\g<1>{line}]", before, count=1)
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    (copy / table).write_text(after, encoding="utf-8")

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'kernels'}"}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_command_line_prunes_with_it(house, rows, tmp_path):
    assert "or ria" in " ".join(house("-m", "compressor", "prune", "--help").split())
    common = ("--dataset", rows, "--num-samples", 4, "--seq-len", 32, "-q")
    prune = ("-m", "compressor", "prune", DEMO, "-o", tmp_path / "out", "--method", "ria")
    house(*prune, "--set", "power=1", *common)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["options"] == {"power": 1.0}
    assert report["totals"]["linears"] == 28
    assert report["totals"]["ratio"] == 0.5625
    assert (
        json.loads(house("-m", "compressor", "verify", tmp_path / "out", "--json"))["problems"]
        == []
    )


def test_the_tests_of_all_methods_take_it_up(house):
    told = house("-m", "pytest", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", "ria")
    assert re.search(r"(\d+) passed", told)[1] == "14"
    assert "failed" not in told

"""Imports run one way between the rooms, and the command line starts without torch."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BASE = {"compressor.errors"}
LEAVES = BASE | {"compressor.pattern", "compressor.stats"}
PACKING = {"compressor_kernels.packing"}
FORMATS = {"compressor.formats", "compressor.formats.dense", "compressor.formats.sparse24", "compressor.formats.armor"}
ALLOWED = {
    "compressor/errors.py": set(),
    "compressor/pattern.py": BASE,
    "compressor/stats.py": BASE,
    "compressor/formats/": FORMATS | PACKING | BASE,
    "compressor/methods/": LEAVES | FORMATS,
    "compressor/refine/": LEAVES,
    "compressor/layout.py": BASE,
    "compressor/checkpoint.py": BASE,
    "compressor/recipe.py": BASE,
    "compressor/report.py": BASE,
    "compressor/data.py": BASE,
    "compressor/writer.py": BASE | {"compressor.checkpoint"},
    "compressor/model.py": BASE | {"compressor.checkpoint"},
    "compressor/calibration.py": BASE | {"compressor.model"},
    "compressor/plan.py": LEAVES
    | {f"compressor.{name}" for name in ("checkpoint", "methods", "model", "recipe", "refine", "report", "writer")}
    | {"compressor"},
    "compressor/arrange.py": BASE | {"compressor_kernels"} | {f"compressor_kernels.{name}" for name in ("linear", "siblings")},
    "compressor/bench/": BASE | {"compressor_kernels.linear", "compressor_kernels.packing"},
    "compressor/runtime.py": FORMATS | BASE | {"compressor", "compressor.layout", "compressor_kernels.linear"},
    "compressor/unpack.py": FORMATS | BASE | {"compressor.checkpoint", "compressor.layout", "compressor.writer"},
    "compressor/evaluate.py": BASE
    | {"compressor", "compressor.data", "compressor.checkpoint", "compressor.report", "compressor.runtime"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(name):
    return name.split(".")[0] in ("compressor", "compressor_kernels")


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_one_way(room):
    files = sorted((ROOT / room).rglob("*.py")) if room.endswith("/") else [ROOT / room]
    for path in files:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts[:2]) if room.endswith("/") else "-"
        foreign = {name for name in imported(path) if ours(name) and not name.startswith(own)} - ALLOWED[room]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_kernels_know_tensors_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"compressor", "transformers", "safetensors"}, path


@pytest.mark.parametrize(
    "command",
    ["['--help']", "['prune', '--help']", "['eval', '--help']", "['bench', '--help']", "['inspect', 'demo/books-1m', '--json']"],
)
def test_starts_without_the_heavy_libraries(command):
    code = (
        f"import sys; sys.argv[1:] = {command}\n"
        "from compressor.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lm_eval', 'datasets', 'accelerate', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_import_compressor_is_light_and_exports_what_it_says():
    code = "import sys, compressor; assert 'torch' not in sys.modules; assert compressor.__all__ == ['load', 'prune']"
    subprocess.run([sys.executable, "-c", code], check=True)

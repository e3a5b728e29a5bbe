"""Imports run one way between the rooms, and the command line starts without torch."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.house import circles, file_graph, flat_files, package_graph, upward


def test_no_circle_of_imports():
    assert not [group for group in circles(file_graph()) if group[0].startswith("compressor.")]
    assert not [group for group in circles(package_graph()) if group[0].startswith("compressor.")]


def test_rooms_import_from_the_layers_below():
    assert not upward()


def test_methods_and_refinements_know_nothing_of_a_run():
    may = ("compressor.errors", "compressor.pattern", "compressor.stats", "compressor.formats")
    for name, targets in file_graph().items():
        room = name.split(".")[1:2]
        if room in (["methods"], ["refine"]):
            own = f"compressor.{room[0]}"
            assert not [t for t in targets if not t.startswith((*may, own))], name


def test_few_files_are_flat():
    assert len(flat_files()) <= 10


def names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_kernels_know_tensors_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in names(path)}
        assert not roots & {"compressor", "transformers", "safetensors"}, path


@pytest.mark.parametrize(
    "command",
    [
        "['--help']",
        "['prune', '--help']",
        "['eval', '--help']",
        "['push', '--help']",
        "['bench', '--help']",
        "['doctor', '--help']",
        "['recipes']",
        "['resume', '--help']",
        "['lowrank', '--help']",
        "['export', '--help']",
        "['verify', '--help']",
        "['inspect', 'demo/books-1m', '--json']",
    ],
)
def test_starts_without_the_heavy_libraries(command):
    code = (
        f"import sys; sys.argv[1:] = {command}\n"
        "from compressor.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lm_eval', 'datasets', 'accelerate', "
        "'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_import_compressor_is_light_and_exports_what_it_says():
    code = (
        "import sys, compressor; assert 'torch' not in sys.modules; assert compressor.__all__ == "
        "['load', 'lowrank', 'plan', 'prune']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

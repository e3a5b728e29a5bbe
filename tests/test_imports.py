"""Imports run one way between the rooms, and the command line starts without torch."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.house import circles, file_graph, flat_files, function_lengths, package_graph, upward


def test_no_circle_of_imports():
    assert not circles(file_graph())
    assert not circles(package_graph())


def test_rooms_import_from_the_layers_below():
    assert not upward()


def test_methods_and_refinements_know_nothing_of_a_run():
    may = ("compressor.errors", "compressor.pattern", "compressor.stats", "compressor.formats")
    may = (*may, "compressor_kernels")  # know tensors only
    for name, targets in file_graph().items():
        room = name.split(".")[1:2]
        if room in (["methods"], ["refine"]):
            own = f"compressor.{room[0]}"
            assert not [t for t in targets if not t.startswith((*may, own))], name


def test_few_files_are_flat_and_no_function_is_long():
    assert len(flat_files()) <= 10
    assert not [(lines, name) for lines, name in function_lengths() if lines > 60]


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
        "'evaluate inspect load lowrank pack plan prune push unpack verify'.split(); "
        "assert all(callable(getattr(compressor, name)) for name in compressor.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_file_locks_of_posix_all_but_compressing_works(tmp_path):
    """As under Windows, where fcntl and resource are not there."""
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import compressor, compressor.runtime, compressor.evaluation, compressor.run.pipeline\n"
        "from compressor.errors import OutputError\n"
        "import compressor.tools.verify, compressor.tools.unpack, compressor.cli\n"
        "assert compressor.inspect('demo/books-1m')['linears']\n"
        "assert compressor.verify('demo/books-1m')['tensors']\n"
        "from pathlib import Path; from compressor.run.journal import Journal\n"
        f"try: Journal(Path({str(tmp_path / 'out')!r}), {{}}, {{}}).__enter__()\n"
        "except OutputError as error: assert 'under Windows use WSL' in str(error)\n"
        "else: raise AssertionError('it ran')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())

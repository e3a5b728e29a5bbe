"""What is shipped: exactly `compressor` and `compressor_kernels`; Hugging Face's `kernels` package
stays what it is.
"""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from compressor_kernels.cpu.build import SOURCES
from tests.conftest import ROOT


def test_wheel_holds_exactly_our_two_packages(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "compressor",
        "compressor_kernels",
    }
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "compressor").rglob("*.py")}
    expected |= {
        f"compressor/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.toml")
    }
    expected |= {"compressor/py.typed", "compressor/page/page.html"}
    assert expected <= set(names)
    assert "compressor_kernels/table.json" in names
    cpu = ROOT / "kernels" / "compressor_kernels" / "cpu"
    sources = {
        f"compressor_kernels/cpu/{p.name}" for p in cpu.iterdir() if p.suffix in (".cpp", ".h")
    }
    assert {Path(name).name for name in sources} == set(SOURCES)
    assert sources <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_the_folder_kernels_does_not_hide_their_package(tmp_path):
    """With our checkout first on the path, `import kernels` still finds the one that is
    installed.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("THEIRS = True")
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]"
    code = f"{path}; import kernels; assert kernels.THEIRS; import compressor_kernels.packing"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_transformers_imports_beside_us():
    subprocess.run(
        [sys.executable, "-c", "from transformers import LlamaForCausalLM"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )


def imported(folder):
    """Names of the packages that the files below `folder` import, wherever the import stands."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0]
            elif isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["eval"], *extras["parquet"], *extras["plot"]]
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_").lower() for line in declared}
    used = {*imported(ROOT / "compressor"), *imported(ROOT / "kernels")} - sys.stdlib_module_names
    used -= {"compressor", "compressor_kernels"}
    comes_with_torch, engines = {"triton"}, {"vllm"}  # torch brings its own; users bring theirs
    assert used - names - comes_with_torch - engines == set()
    assert names - used == set()

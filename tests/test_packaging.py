"""What is shipped: exactly `compressor` and `compressor_kernels`; Hugging Face's `kernels` package stays what it is."""

import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT


def test_wheel_holds_exactly_our_two_packages(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"compressor", "compressor_kernels"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "compressor").rglob("*.py")}
    assert expected <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_nothing_here_is_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers, sys; assert not any('/kernels/compressor_kernels' in str(getattr(sys.modules.get('kernels'), '__file__', '')) for _ in '1')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)

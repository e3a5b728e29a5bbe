"""The Triton kernels in the interpreter, in a process of its own for each file of
tests/interpreted.
"""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["sparse24", "armor", "model", "gpu"])
def test_in_the_interpreter(name):
    pytest.importorskip("triton", reason="Triton is not installed")
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-n",
            "0",
            f"tests/interpreted/{name}.py",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""These tests run in a process of their own, with TRITON_INTERPRET=1: tests/test_kernels.py starts
it.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/test_kernels.py, with TRITON_INTERPRET=1", allow_module_level=True)

from ptx_emulator.poison import poison
from tests.interpreted import emulate

emulate.install()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)

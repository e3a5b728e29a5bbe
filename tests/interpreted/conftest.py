"""These tests run in a process of their own, with TRITON_INTERPRET=1: tests/test_kernels.py starts it."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/test_kernels.py, with TRITON_INTERPRET=1", allow_module_level=True)

import torch

from tests.interpreted import emulate

emulate.install()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    plain, plain_new = torch.empty, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(plain(*args, **options)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poison(plain_new(*args, **options)))

"""`compress doctor`: one screen, and whatever is broken is said, not raised."""

import json

import pytest
import torch

from compressor import doctor
from compressor_kernels.cpu import build
from compressor_kernels.linear import Sparse24Linear
from tests.cpu_problems import here


def test_one_screen(cli):
    lines = cli("doctor").stdout.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 160
    assert [line for line in lines if not line.startswith(" ")] == [
        "versions",
        "devices",
        "kernels",
        "room",
        "Hub",
    ]


def test_json(cli):
    found = {finding["name"]: finding for finding in json.loads(cli("doctor", "--json").stdout)}
    assert {
        "python",
        "torch",
        "transformers",
        "cpu",
        "2:4 on cpu",
        "triton",
        "memory",
        "here",
    } <= set(found)
    assert found["torch"]["state"] == found["2:4 on cpu"]["state"] == "ok"


def test_build_compiles_the_cpu_kernels_and_says_so(cli, monkeypatch, tmp_path):
    here()
    said = cli("doctor", "--build").stdout
    assert "packed weights are computed packed" in said
    monkeypatch.setattr(build, "_found", build.Kernels("no compiler"))
    said = cli("doctor", "--build").stdout
    assert "packed weights are computed dense on the CPU: no compiler" in said
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    assert "not compiled yet" in cli("doctor").stdout
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_computes_something_else_is_broken(cli, monkeypatch):
    from compressor_kernels.linear import Sparse24Linear

    right = Sparse24Linear.forward
    monkeypatch.setattr(Sparse24Linear, "forward", lambda self, x: right(self, x) * 1.02)
    assert "is off by 0.02" in cli("doctor", code=1).stdout


def test_a_package_that_breaks_is_one_finding(cli, monkeypatch):
    def fail(kind):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(doctor, "_kernel", fail)
    found = json.loads(cli("doctor", "--json", code=1).stdout)
    assert [finding for finding in found if finding["state"] == "broken"] == [
        {
            "group": "kernels",
            "name": "packed linears",
            "state": "broken",
            "text": "RuntimeError: no kernel image is available",
        }
    ]
    assert found[-1]["group"] == "Hub"


@pytest.mark.parametrize(
    ("version", "state"), [("5.20.0", "ok"), ("5.14.9", "broken"), ("6.0.0", "broken")]
)
def test_versions_outside_the_tested_range(monkeypatch, version, state):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: version if name == "transformers" else real(name),
    )
    (finding,) = [finding for finding in doctor.examine() if finding.name == "transformers"]
    assert finding.state == state


def test_the_layout_that_a_linear_is_loaded_in_is_tried_too(monkeypatch):
    def damaged(self):
        with torch.no_grad():
            self.weight_values.neg_()

    monkeypatch.setattr(doctor, "_cpu_kernels", lambda build: ("ok", "compiled"))
    monkeypatch.setattr(Sparse24Linear, "prepare_", damaged)
    state, text = doctor._kernel("cpu")
    assert state == "broken"
    assert "is off by 2" in text

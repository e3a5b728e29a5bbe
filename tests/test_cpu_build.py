"""How the CPU kernels come to be: compiled once for many processes, whole or not at all, and never
an error.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from compressor_kernels.cpu import build
from tests.conftest import ROOT
from tests.cpu_problems import here

PRINT = "from compressor_kernels.cpu.build import kernels; print(kernels())"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Replace the compiler by a shell script; it is told with what to end."""
    here()

    def put(script, folder="bin"):
        path = tmp_path / folder / "g++"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return put


# stands for a compiler whose output is its last argument but for the options: what it is told to
# write, after a while, and a line in a log
FAKE = (
    'if [ "$1" = --version ]; then echo 1; exit; fi\n'
    'echo run >> "$LOG"\n'
    "{wait}\n"
    'while [ "$1" != -o ]; do shift; done; echo library > "$2"'
)


def start(code=PRINT, **more):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, **more
    )


def test_what_is_compiled_here_is_found_again_and_is_the_same_for_all(tmp_path):
    here()
    first = build.kernels()
    assert build.kernels() is first
    again = build.find_or_compile()
    assert (again.path, again.seconds) == (first.path, 0.0)
    assert sorted(path.name for path in first.path.parent.iterdir()) == [build.LIBRARY, "sha256"]


def test_the_threads_are_torchs(tmp_path):
    """One OpenMP is in the process: with a second one there would be two pools of threads."""
    here()
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "gomp" in line or "omp5" in line}
    assert len(loaded) == 1


def test_eight_processes_that_start_together_compile_once(cache, compiler, tmp_path, monkeypatch):
    compiler(FAKE.replace("{wait}", "sleep 1"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    code = "from compressor_kernels.cpu.build import find_or_compile; print(find_or_compile().path)"
    processes = [start(code) for _ in range(8)]
    paths = {process.communicate(timeout=200)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 8
    assert len(paths) == 1
    assert (tmp_path / "log").read_text().split() == ["run"] * 3  # two compiled once, linked once


def test_a_killed_build_leaves_nothing_that_is_used(cache, compiler, tmp_path, monkeypatch):
    compiler(FAKE.replace("{wait}", '[ -e "$LOG.go" ] || sleep 60'))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    process = start(start_new_session=True)
    while not (tmp_path / "log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path for path in cache.iterdir() if ".build-" in path.name]
    (tmp_path / "log.go").touch()
    found = build.find_or_compile()
    assert found.path.read_text() == "library\n"
    assert found.seconds > 0
    assert not [path for path in cache.iterdir() if ".build-" in path.name]


def test_a_damaged_library_is_compiled_again(cache, compiler, tmp_path, monkeypatch):
    compiler(FAKE.replace("{wait}", ""))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    path = build.find_or_compile().path
    for damage in (lambda: path.write_text("libr"), path.unlink, (path.parent / "sha256").unlink):
        damage()
        found = build.find_or_compile()
        assert found.path == path
        assert path.read_text() == "library\n"
        assert found.seconds > 0


def problem(monkeypatch):
    """What a new process would say; at most one line."""
    monkeypatch.setattr(build, "_found", None)
    said = build.kernels().problem
    assert said is not None
    assert "\n" not in said
    return said


def test_no_compiler(cache, monkeypatch):
    here()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "there is no g++ on PATH" in problem(monkeypatch)
    monkeypatch.setenv("CXX", "/nowhere/clang++")
    assert "there is no /nowhere/clang++ on PATH" in problem(monkeypatch)
    assert not cache.exists()


def test_a_compiler_that_fails_or_makes_no_library(cache, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    broken = FAKE.replace("{wait}", "echo 'ops.cpp:1: error: no such header' >&2; exit 1")
    compiler(broken)
    assert "cannot compile the CPU kernels: ops.cpp:1: error: no such" in problem(monkeypatch)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    compiler(FAKE.replace("{wait}", ""), "other")
    assert "Could not load this library" in problem(monkeypatch)


def test_a_cache_that_cannot_be_written(compiler, tmp_path, monkeypatch):
    here()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    assert "the CPU kernels cannot be kept in" in problem(monkeypatch)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("machine", lambda: "aarch64", "there are no CPU kernels for aarch64 under linux"),
        ("NEEDED", ("avx512f", "avx1024"), "this CPU has no avx1024"),
    ],
)
def test_another_cpu(cache, monkeypatch, name, value, match):
    here()
    monkeypatch.setattr(build.platform if name == "machine" else build, name, value)
    assert match in problem(monkeypatch)

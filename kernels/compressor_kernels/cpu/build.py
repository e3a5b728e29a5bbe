"""The CPU kernels, compiled on first use by this machine's compiler for this machine's CPU.

The library lies in the cache folder under a name made of the sources, the compiler, torch and the
instructions of the CPU. It appears there complete or not at all, processes that start together
compile once, and one that is killed leaves nothing that another would use. Where there is no
compiler, no AVX-512 or no room, `kernels` says why and nothing is raised.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from threading import Lock

from compressor_kernels.cache import cache_folder

SOURCES = ("ops.cpp", "search.cpp", "sparse24.h", "thin.h", "tiles.h")
NEEDED = (
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_vbmi2",
    "avx512vbmi",
    "f16c",
    "fma",
)
PAIRS = "avx512_bf16"  # products of bfloat16; without them they are computed in float32
MATRICES = "amx_bf16"  # torch multiplies many rows with these
OPTIONS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-w")
TIMEOUT = 600  # seconds that the compiler may take
LIBRARY = "compressor_kernels.so"


class NoKernelsError(Exception):
    """Why the kernels do not run here, in one line."""


@dataclass(frozen=True)
class Kernels:
    """What became of the kernels in this process.

    Attributes:
        problem: why they do not run; None where they do.
        path: the library.
        seconds: that compiling took; 0 where it was there already.
    """

    problem: str | None = None
    path: Path | None = None
    seconds: float = 0.0


_lock = Lock()
_found: Kernels | None = None


def kernels() -> Kernels:
    """Load the kernels, and compile them before where they were not yet; done once a process."""
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _tried()
    return _found


def _tried() -> Kernels:
    try:
        found = find_or_compile()
        from compressor_kernels.cpu import ops

        ops.load(found.path)
        return found
    except Exception as error:  # a compiler, a loader or a file system may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Kernels(reason[:300])


def find_or_compile(compiling: bool = True) -> Kernels:
    """The compiled library, not loaded.

    Raises NoKernelsError or OSError where it cannot be had, or, not `compiling`, is not there yet.
    """
    cpu = _cpu()
    compiler = _compiler()
    commands = _commands(compiler, cpu)
    name = _key(compiler, commands, cpu)
    root = cache_folder() / "kernels"
    folder = root / name
    if _complete(folder):
        return Kernels(path=folder / LIBRARY)
    if not compiling:
        raise NoKernelsError("not compiled yet, as the first packed model on the CPU will")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{name}.lock"):
            if _complete(folder):  # by whoever held the lock
                return Kernels(path=folder / LIBRARY)
            started = time.monotonic()
            _compile(commands, folder)
            return Kernels(path=folder / LIBRARY, seconds=time.monotonic() - started)
    except OSError as error:
        raise NoKernelsError(
            f"the CPU kernels cannot be kept in {root}: {error.strerror}"
        ) from None


def _cpu() -> tuple[str, ...]:
    """The instruction sets of this CPU that the kernels use. Raises NoKernelsError."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise NoKernelsError(
            f"there are no CPU kernels for {platform.machine()} under {sys.platform}"
        )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    missing = [flag for flag in NEEDED if flag not in flags]
    if missing:
        raise NoKernelsError(f"the CPU kernels need AVX-512, and this CPU has no {missing[0]}")
    return (*NEEDED, *(flag for flag in (PAIRS, MATRICES) if flag in flags))


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise NoKernelsError(f"the CPU kernels need a C++ compiler, and there is no {names[0]} on PATH")


def _commands(compiler: str, cpu: tuple[str, ...]) -> list[list[str]]:
    """Compile each and link; in a folder that holds the sources."""
    import torch

    home = Path(torch.__file__).parent
    includes = (home / "include", home / "include" / "torch" / "csrc" / "api" / "include")
    abi = int(torch.compiled_with_cxx11_abi())
    machine = [f"-m{flag.replace('avx512_', 'avx512')}" for flag in cpu if flag != MATRICES]
    if MATRICES in cpu:
        machine.append("-DCOMPRESS_AMX")
    # torch's own OpenMP: with another there would be two pools of threads
    openmp = next((str(path) for path in (home / "lib").glob("libgomp*.so*")), "-lgomp")
    return [
        [
            *(compiler, "-c", "ops.cpp", "-o", "ops.o", *OPTIONS, *machine),
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
            *(part for path in includes for part in ("-isystem", str(path))),
        ],
        [compiler, "-c", "search.cpp", "-o", "search.o", *OPTIONS, *machine],
        [
            *(compiler, "-shared", "ops.o", "search.o", "-o", LIBRARY),
            *("-L", str(home / "lib"), "-ltorch_cpu", "-lc10", openmp),
        ],
    ]


def compiler_version() -> str:
    """What the compiler says of itself. Raises NoKernelsError without one."""
    return _version(_compiler()).splitlines()[0]


def _version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT
    ).stdout


def _key(compiler: str, commands: list[list[str]], cpu: tuple[str, ...]) -> str:
    import torch

    version = _version(compiler)
    parts = [torch.__version__, torch.version.git_version, version, repr(commands), repr(cpu)]
    parts += [_source(name).decode() for name in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _source(name: str) -> bytes:
    return files("compressor_kernels").joinpath("cpu", name).read_bytes()


def _complete(folder: Path) -> bool:
    """The library is there as it was written, and nobody else's."""
    try:
        library = folder / LIBRARY
        stored = (folder / "sha256").read_text()
        own = library.stat().st_uid == os.getuid()
        return own and hashlib.sha256(library.read_bytes()).hexdigest() == stored
    except OSError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine; a process that dies lets go of it."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(commands: list[list[str]], folder: Path) -> None:
    """Make `folder`; called by one process at a time. Raises NoKernelsError or OSError."""
    for left in folder.parent.glob(f"{folder.name}.build-*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.build-", dir=folder.parent))
    try:
        for name in SOURCES:
            (work / name).write_bytes(_source(name))
        for command in commands:
            done = subprocess.run(
                command, cwd=work, capture_output=True, text=True, timeout=TIMEOUT
            )
            if done.returncode:
                raise NoKernelsError(
                    f"{command[0]} cannot compile the CPU kernels: {_why(done.stderr)}"
                )
        library = (work / LIBRARY).read_bytes()
        (work / "sha256").write_text(hashlib.sha256(library).hexdigest())
        for name in (*SOURCES, "ops.o", "search.o"):
            (work / name).unlink(missing_ok=True)
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _why(text: str) -> str:
    lines = text.strip().splitlines() or ["it says nothing"]
    return next((line for line in lines if "error" in line), lines[-1])[:200]

"""Kernels compiled before they are timed, by all cores at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

from compressor_kernels import backend

LAUNCHING = ("sparse24", "armor", "lowrank", "pivot")  # modules of compressor_kernels that launch


def compile_ahead(runs: Iterable[Callable[[], Any]]) -> None:
    """Compile what `runs` launch, and launch nothing; what cannot be compiled fails where it is
    run.
    """
    if not backend.interpreting():
        with _compiling():
            for run in runs:
                with suppress(Exception):
                    run()


@contextmanager
def _compiling() -> Iterator[None]:
    import triton

    def compile_only(
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        counter: Any = None,
        pdl: bool = False,
        **settings: Any,
    ) -> None:
        """Like `backend.launch`; nothing counts in `counter`."""
        kernel.warmup(*arguments, grid=grid, **settings, **({"launch_pdl": True} if pdl else {}))

    with ExitStack() as stack:
        for name in LAUNCHING:
            stack.enter_context(
                mock.patch.object(sys.modules[f"compressor_kernels.{name}"], "launch", compile_only)
            )
        pool = stack.enter_context(ThreadPoolExecutor())
        stack.enter_context(triton.AsyncCompileMode(pool, ignore_errors=True))
        yield

"""Standard output and error that cannot fail a run: what is only told is never worth the work.

Characters that a stream's encoding lacks are written as escapes. Messages and progress that
standard error does not take any more (a full disk, a closed pipe) are dropped. Results on standard
output are not: whoever redirects them is told that they are not there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO, cast


class Unfailing:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of any stream."""
        with suppress(OSError, ValueError):  # ValueError: it is closed
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of any stream."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Inside the `with`, standard output and error are such streams."""
    before = sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 # open to the end
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, Unfailing(sys.stderr))
    try:
        yield
    finally:
        sys.stderr = before


@contextmanager
def only_told() -> Iterator[None]:
    """What is printed inside is about work that is done, and there: it is not worth an error."""
    try:
        yield
        finish()
    except OSError as error:
        drop_output()
        print(f"note: standard output ends here: {error.strerror or error}", file=sys.stderr)


def finish() -> None:
    """Write out what standard output holds back. Raises OSError where it does not take it.

    At the end of the process Python would try it itself, and could only complain.
    """
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
        raise


def drop_output() -> None:
    """Nothing goes to standard output any more, nor what is still held back."""
    with suppress(OSError, ValueError):  # ValueError: it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

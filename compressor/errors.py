"""Every error a user can cause, each one clear line: what, where, what is accepted, what to do.

CompressError            exit code 1; never shown with a traceback
├── UsageError           exit code 2; an option, pattern, method or recipe that cannot be used
├── CheckpointError      the model folder, its index, its shards or its architecture
├── DataError            calibration or test text
├── NumericalError       NaN or Inf in weights or activations, a Gram matrix that cannot be factored
├── OutputError          the output folder: exists, not writable, no space; the work state: not this
                         run's, damaged
├── HubError             the Hub refused a push, or the connection to it broke
├── ProcessError         another process of a run on several devices is gone
└── InterruptedRun       exit code 130 or 143; Ctrl-C or a signal, with what is left to go on from
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 1000  # characters of a message: names and values in it come from files


class CompressError(Exception):
    """Base of all expected errors. `str(error)` is one line fit for a terminal, whatever names it
    quotes.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        line = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…")


class UsageError(CompressError):
    """An option value that cannot be used."""

    exit_code = 2


class CheckpointError(CompressError):
    """The input checkpoint is missing, malformed or of a kind that is not supported."""


class DataError(CompressError):
    """Calibration or test data is missing, malformed or too short."""


class NumericalError(CompressError):
    """A weight or an activation is not finite, or a matrix cannot be factored."""


class OutputError(CompressError):
    """The output cannot be written."""


class HubError(CompressError):
    """The Hub refused what was asked for, or the connection to it broke."""


class ProcessError(CompressError):
    """A run of several processes lost one of them."""


class InterruptedRun(CompressError):  # noqa: N818  # no error: it was asked for
    """The run was told to end."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def about(name: str) -> Iterator[None]:
    """A NumericalError raised inside says which weight it is about."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from None


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean 'wanda'?` for the closest known word, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(
        word.lower(), known, n=1
    )
    return f"; did you mean {close[0]!r}?" if close else ""

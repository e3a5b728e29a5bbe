"""Drawing is done by matplotlib, which is an extra and imported only where something is drawn."""

from __future__ import annotations

from importlib.util import find_spec

from compressor.errors import UsageError


def require_matplotlib(option: str) -> None:
    """Raise UsageError, in the name of the command line's `option`, where matplotlib is not
    installed.
    """
    if find_spec("matplotlib") is None:
        raise UsageError(f"{option} needs matplotlib: pip install 'compress-llm[plot]'")

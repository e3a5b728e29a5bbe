"""Threads that switch as often as Python can."""

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any


def at_once(works: Iterable[Callable[[], Any]]) -> None:
    """Run each in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=work) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)

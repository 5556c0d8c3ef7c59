"""Ctrl-C waits for the compiler: raised inside it, jax 0.10.2 ends the process by a fault."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """KeyboardInterrupt is raised at the end of the block instead of in the middle.

    Does nothing outside the main thread, which alone is interrupted, or where somebody else handles
    the signal.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def remember(signum: int, frame: Any) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt

"""Ctrl-C and SIGTERM as a question that long work asks between its steps."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stop_signals"]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """``should_stop`` for the length of a with-block: true after a Ctrl-C or SIGTERM; a second Ctrl-C ends at once.

    Outside the main thread, where signals do not arrive, it stays false.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # torchrun passes a Ctrl-C on as SIGTERM
        asked.set()
        sys.stderr.write("\nip2p: stopping, and keeping what is finished; once more ends at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

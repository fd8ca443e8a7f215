"""Ctrl-C and SIGTERM as a request that the loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from puna.errors import Interrupted
from puna.train.run import GO_ON

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """The signal that asked to stop, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; a second one does not wait for the step to end."""
        if self.signal is not None:
            raise Interrupted(
                number,
                f"stopped at once, before this step was saved; what was saved before is whole: {GO_ON}",
            )
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM inside the context; the handlers of before come back after it."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python lets only the main thread handle signals
        return
    before = {number: signal.signal(number, request.handle) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

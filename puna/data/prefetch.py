"""The next items made ahead, while the present one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
WAIT_SECONDS = 0.1  # how soon the thread notices that nobody wants more


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them made ahead by a thread.

    What the source raises is raised here, in its place. Closing or dropping this iterator ends the thread.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    closed = threading.Event()
    worker = threading.Thread(target=_fill, args=(items, ready, closed), name="prefetch", daemon=True)
    worker.start()
    try:
        while True:
            item = ready.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return
    finally:
        closed.set()
        worker.join()


def _fill(items: Iterator[T], ready: queue.Queue[T | _End], closed: threading.Event) -> None:
    try:
        for item in items:
            if not _put(item, ready, closed):
                return
        _put(_End(None), ready, closed)
    except BaseException as error:
        _put(_End(error), ready, closed)


def _put(item: T | _End, ready: queue.Queue[T | _End], closed: threading.Event) -> bool:
    """False when the consumer has gone."""
    while not closed.is_set():
        try:
            ready.put(item, timeout=WAIT_SECONDS)
        except queue.Full:
            continue
        return True
    return False

"""What takes long, beside the event loop: heavy work one at a time, and none for clients that have left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from puna.serve.faults import TooLate

T = TypeVar("T")
QUICK = 4 << 10  # bytes of a body that are dealt with within about a millisecond: as long as a thread takes
LIGHT = 64 << 10  # bytes that others can wait for
AT_ONCE = 2  # pieces of light work; they share one interpreter


class Aside:
    """Threads for what would hold the event loop up.

    Python lets nobody end a thread, so what one has begun goes on for nobody where the client leaves; what
    waits for its turn does not begin then, and is forgotten. Light work never waits for heavy work.
    """

    def __init__(self) -> None:
        self._light, self._heavy = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(1)

    async def do(self, size: int, work: Callable[[], T]) -> T:
        """What `work` gives, or raises; `size` is how many bytes it deals with."""
        if size <= QUICK:
            return work()
        turn = self._light if size <= LIGHT else self._heavy
        await turn.acquire()
        loop = asyncio.get_running_loop()
        found: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            turn.release()
            if found.cancelled():
                return
            if error is None:
                found.set_result(result)  # type: ignore[arg-type]
            else:
                found.set_exception(error)

        def run() -> None:
            told: tuple[T | None, BaseException | None]
            try:
                told = work(), None
            except BaseException as error:
                told = None, error
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(finish, *told)

        # A daemon: the process does not wait for it. It takes much less time to start than what it does.
        threading.Thread(target=run, name="puna-aside", daemon=True).start()
        return await found


async def unless_left(work: Awaitable[T], receive: Receive, arrived: float, seconds: float) -> T:
    """What `work` gives, as long as the client waits for it, and for so many seconds from its arrival.

    Raises:
        ClientDisconnect: the client has left.
        TooLate: the time is over.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(receive))
    try:
        rest = max(arrived + seconds - time.monotonic(), 0)
        await asyncio.wait({task, gone}, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise TooLate(seconds)
    finally:
        await ended(task, gone)


async def left(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def ended(*tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
    """Until all are over; those that are not are cancelled."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

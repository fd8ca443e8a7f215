"""Work beside the event loop: light before heavy, one heavy at a time, nothing for clients that have left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from puna.serve.aside import LIGHT, QUICK, Aside, unless_left
from puna.serve.faults import TooLate

HEAVY = LIGHT + 1


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, 20)

    return asyncio.run(bounded())


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.002)


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def test_what_is_done_is_given_and_faults_are_raised() -> None:
    async def work() -> None:
        aside, here = Aside(), threading.get_ident()
        for size in (0, QUICK, QUICK + 1, LIGHT, HEAVY):
            assert (await aside.do(size, threading.get_ident) == here) == (size <= QUICK)
            with pytest.raises(ZeroDivisionError):
                await aside.do(size, lambda: 1 // 0)

    run(work())


def test_light_work_does_not_wait_for_heavy_work_of_which_there_is_one_at_a_time() -> None:
    async def work() -> None:
        aside, begun, gate, order = Aside(), threading.Event(), threading.Event(), []

        def first() -> None:
            begun.set()
            gate.wait()
            order.append(1)

        heavy = [asyncio.ensure_future(aside.do(HEAVY, first))]
        heavy.append(asyncio.ensure_future(aside.do(HEAVY, lambda: order.append(2))))
        await until(begun)
        assert await aside.do(QUICK + 1, lambda: "light") == "light"
        assert order == []
        gate.set()
        await asyncio.gather(*heavy)
        assert order == [1, 2]

    run(work())


def test_nobody_works_for_those_who_have_left() -> None:
    async def work() -> None:
        aside, begun, gate, done = Aside(), threading.Event(), threading.Event(), []

        def first() -> None:
            begun.set()
            gate.wait()
            done.append(1)

        tasks = [asyncio.ensure_future(aside.do(HEAVY, first))]
        await until(begun)
        tasks += [asyncio.ensure_future(aside.do(HEAVY, lambda: done.append(2))) for _ in range(5)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        last = asyncio.ensure_future(aside.do(HEAVY, lambda: done.append(3)))
        await asyncio.sleep(0.02)
        assert done == []  # what has begun keeps its turn to its end
        gate.set()
        await last
        assert done == [1, 3]

    run(work())


def test_clients_that_leave_and_time_that_is_over() -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def work() -> None:
        assert await unless_left(asyncio.sleep(0.01, "done"), never, time.monotonic(), 5) == "done"
        with pytest.raises(ClientDisconnect):
            await unless_left(never(), gone, time.monotonic(), 5)
        began = time.monotonic()
        with pytest.raises(TooLate, match=r"within 10\.05 seconds"):
            await unless_left(never(), never, began - 10, 10.05)
        assert time.monotonic() - began < 2

    run(work())

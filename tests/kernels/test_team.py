"""Threads at hand during a pass: every piece is done when `share` returns, whoever took part in it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from puna.kernels.library import load, openmp_fork

TEAM = load("team").functions
pytestmark = pytest.mark.skipif(
    TEAM is None or openmp_fork() is None, reason=load("team").fault or "no OpenMP"
)

RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def functions() -> ctypes.CDLL:
    assert TEAM is not None
    TEAM.leads.restype = ctypes.c_bool
    return TEAM


def with_team(work: Callable[[], None], threads: int) -> None:
    functions().with_team(RUN(lambda _: work()), None, threads)


def share(piece: Callable[[], None], threads: int = 3) -> None:
    functions().share(RUN(lambda _: piece()), None, threads, 0)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_piece_is_done_when_share_returns(threads: int) -> None:
    lock, inside, seen = threading.Lock(), [0, 0], list[int]()

    def piece() -> None:
        with lock:
            inside[0] += 1
        with lock:
            inside[1] += 1

    def work() -> None:
        assert functions().leads() == (threads > 1)
        for _ in range(200):
            before = inside[0]
            share(piece)
            assert inside[0] == inside[1]
            seen.append(inside[0] - before)

    with_team(work, threads)
    assert len(seen) == 200 and min(seen) >= 1
    assert max(seen) <= (threads if threads > 1 else 3)
    assert not functions().leads()


def test_others_take_part() -> None:
    """A piece that two threads must be in at once to end."""
    barrier = threading.Barrier(2, timeout=60)

    def meet() -> None:
        barrier.wait()

    def work() -> None:
        for _ in range(20):
            share(meet)

    with_team(work, 2)
    assert not barrier.broken


def test_a_piece_within_a_piece_is_done_by_who_asks_for_it() -> None:
    done: list[int] = []
    lock = threading.Lock()

    def inner() -> None:
        with lock:
            done.append(threading.get_ident())

    with_team(lambda: share(lambda: share(inner, 1)), 3)
    assert 1 <= len(done) <= 3


def test_a_team_within_a_team_is_the_same() -> None:
    depth: list[bool] = []
    with_team(lambda: with_team(lambda: depth.append(functions().leads()), 2), 2)
    assert depth == [True] and not functions().leads()


def test_several_threads_may_each_lead_one() -> None:
    counts = [0] * 4

    def lead(which: int) -> None:
        def work() -> None:
            for _ in range(50):
                share(lambda: None)
            counts[which] += 1

        with_team(work, 2)

    leaders = [threading.Thread(target=lead, args=(which,)) for which in range(4)]
    for leader in leaders:
        leader.start()
    for leader in leaders:
        leader.join()
    assert counts == [1] * 4


CHILD = """
import os, torch
from puna.kernels import panels
torch.set_num_threads(2)
weight, x = torch.randn(4096, 512), torch.randn(40, 512)
packed = panels.into_panels(weight)
expected = panels.multiply(x, packed, None, 4096).flatten().tolist()
child = os.fork()
if not child:
    os._exit(int(panels.multiply(x, packed, None, 4096).flatten().tolist() != expected))
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_child_computes_alone() -> None:
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "2"})

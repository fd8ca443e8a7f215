"""Python in several processes, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_in_ranks(size: int, *arguments: str) -> None:
    """`python arguments…` in `size` processes of one world; all of them must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(size)
    ]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0] * size
    finally:
        for process in ranks:  # where one failed, the others wait for it
            process.kill()

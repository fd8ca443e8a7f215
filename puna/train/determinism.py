"""What makes a run repeat bit for bit: deterministic kernels, fixed threads, seeds by position."""

from __future__ import annotations

import hashlib
import os

import torch

from puna.settings import Settings, layout


class DeterminismSettings(Settings):
    """How many CPU threads compute; None takes torch's choice, one per core."""

    threads: int | None = layout(None, ge=1, le=1024)


def make_deterministic(settings: DeterminismSettings, device: torch.device) -> int:
    """Set torch, for this process, to kernels that give the same bits every time; returns the thread count.

    Sums are split by threads, so their number is part of the result: it is fixed here and recorded.
    """
    if device.type == "cuda":
        # Read by cuBLAS when it starts: without it, products on two streams may use different workspaces.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # writes twice
    torch.backends.cudnn.benchmark = False
    return torch.get_num_threads()


def seed_for(seed: int, step: int, micro: int) -> int:
    """The seed of one micro-batch of one step: dropout is then a function of these three alone.

    No random state has to be saved, and validation or samples in between cannot disturb it.

    >>> seed_for(0, 0, 0) == seed_for(0, 0, 0), seed_for(0, 0, 1) == seed_for(0, 1, 0)
    (True, False)
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits on every device

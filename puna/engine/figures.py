"""What an engine has done, and what it holds right now: figures for benchmarks and for whoever serves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Times:
    """What an engine has done, and the seconds it took."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    sequences: int = 0
    """Summed over the steps: divided by `steps`, how many were computed together."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("schedule", "model", "sample", "text"), 0.0)
    )


@dataclass(frozen=True)
class Load:
    """What an engine holds right now; blocks are of BLOCK positions each."""

    running: int
    waiting: int
    blocks_used: int
    blocks: int
    preemptions: int

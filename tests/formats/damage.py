"""What the tests of damaged files share: bounds on time and memory, JSON bent in its structure, fuzzing."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna import formats
from puna.errors import InputError
from puna.formats.packed import expanded
from puna.model.llama import Llama
from puna.model.weights import load_weights

SECONDS, MEGABYTES = 2.0, 64  # bounds for one file; the model itself has a tenth of a megabyte


@contextmanager
def bounded() -> Iterator[None]:
    """Whatever happens inside takes little time and memory."""
    began, before = time.monotonic(), _peak()
    yield
    assert time.monotonic() - began < SECONDS
    assert _peak() - before < MEGABYTES << 20


def _peak() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def read_whole(path: Path) -> None:
    """Open a model and put it into memory."""
    source = formats.open_model(path)
    load_weights(Llama(source.config), expanded(source.weights))
    source.tokenizer()


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308, 1e-320,
    "", "x", "llama", "yarn", [], [1], [[1]], {}, {"rope_type": "yarn"}, {"type": "dynamic", "factor": 1e300},
    {"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 2**70},
]  # fmt: skip


def bent(draw: random.Random, value: Any) -> Any:
    """JSON with one part replaced, removed, repeated or bent itself."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return {**value, key + draw.choice(["", "x", ".0"]): draw.choice(VALUES)}
        return {**value, key: bent(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], bent(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice([-1, 1, 4, 8, 2**32])
    return draw.choice(VALUES)


def cut_or_flipped(draw: random.Random, data: bytes, head: int = 4000) -> bytes:
    """Bytes without structure: cut short, or some of the first `head` replaced."""
    if draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 20])):
        changed[draw.randrange(min(len(changed), head))] = draw.randrange(256)
    return bytes(changed)


def fuzz(
    model: Path,
    files: list[Path],
    damaged: Callable[[random.Random, Path], bytes],
    rounds: int,
    read: Callable[[Path], None] = read_whole,
) -> int:
    """Damage one of `files` after the other; each is refused in one line or read, in bounded time and memory.

    Returns how many were read all the same.
    """
    originals = {path: path.read_bytes() for path in files}
    opened = 0
    for seed in range(rounds):
        draw = random.Random(seed)
        path = draw.choice(files)
        path.write_bytes(damaged(draw, path))
        try:
            with bounded():
                read(model)
            opened += 1
        except InputError as error:
            assert "\n" not in str(error), seed
        finally:
            path.write_bytes(originals[path])
    return opened

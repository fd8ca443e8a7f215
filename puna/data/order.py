"""The order in which rows are visited: shuffled, without ever holding the shuffle.

A permutation table of a trillion-token set would take gigabytes and minutes at every start. A Feistel network
gives the image of any single index instead, in constant memory: split the index into (left, right), add a
keyed hash of one half to the other, swap, repeat. Each round can be undone, so the whole is a bijection,
whatever the hash. The mixed-radix form and the walk back into the domain are from Black and Rogaway,
"Ciphers with Arbitrary Finite Domains" (2002).
"""

from __future__ import annotations

import functools
import hashlib
import math

ROUNDS = 8
MASK = (1 << 64) - 1


def row_at(position: int, rows: int, seed: int) -> int:
    """The row visited at a global sample position: epoch `position // rows`, shuffled afresh in each epoch.

    >>> [row_at(position, rows=5, seed=0) for position in range(10)]
    [1, 2, 0, 4, 3, 1, 3, 0, 2, 4]
    """
    epoch, index = divmod(position, rows)
    return permute(index, rows, seed, epoch)


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """The image of `index` under the permutation of [0, size) that (seed, epoch) names."""
    assert 0 <= index < size
    keys = _round_keys(seed, epoch)
    width = math.isqrt(size - 1) + 1  # the smallest square that holds [0, size): few steps fall outside
    while True:  # a bijection on the square, iterated, must come back into [0, size)
        index = _feistel(index, width, keys)
        if index < size:
            return index


def _feistel(index: int, width: int, keys: tuple[int, ...]) -> int:
    left, right = divmod(index, width)
    for key in keys:
        left, right = right, (left + _mix(right ^ key)) % width
    return left * width + right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every input bit changes about half of the output bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))

"""Stochastic rounding to bfloat16: up or down with the chances that make the mean exact.

An update of a bfloat16 number is mostly smaller than half its last bit, and rounding to nearest would lose it
every time. Random bits are a function of a key and of the number's place in its tensor, so that they are the
same after a resumption, on any number of threads, and in C++ (adamw.cpp).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
LONGEST = 2**32
"""Numbers of a tensor: places are told apart by 32 bits."""


class Key(NamedTuple):
    """What random bits are a function of, beside the place: two numbers of 32 bits."""

    first: int
    second: int

    @classmethod
    def of(cls, seed: int, step: int, name: str) -> Key:
        """The key of a tensor's rounding in one step of a run."""
        digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def random_halves(
    count: int, key: Key, device: torch.device, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Three independent numbers below 2^16 for each of `count` places from `first` on: int64 (count,).

    The steps of https://nullprogram.com/blog/2018/07/31/ (lowbias32), with the second key in between.
    """
    x = (torch.arange(first, first + count, device=device) + key.first) & _MASK
    x = ((x ^ x >> 16) * 0x7FEB352D + key.second) & _MASK
    x = ((x ^ x >> 15) * 0x846CA68B) & _MASK
    x = x ^ x >> 16
    again = ((x ^ x >> 15) * 0x9E3779B1) & _MASK
    return x >> 16, x & 0xFFFF, again >> 16


def rounded(x: Tensor, halves: Tensor) -> Tensor:
    """Float32 numbers in bfloat16: a number between two becomes the upper with the chance of its distance.

    Args:
        x: of any shape.
        halves: as many of `random_halves`.
    """
    # Added to the 16 bits that are cut off: the sum carries over with just that chance.
    bits = x.contiguous().view(torch.int32) + halves.view(x.shape).to(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)

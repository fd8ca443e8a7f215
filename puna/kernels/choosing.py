"""The C++ choice of tokens: its call from Python, one for all rows of a step.

B rows of logits   E rows of them that rules for single ids have changed   V vocabulary
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from functools import cache
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from puna.kernels.library import NAMES, load

NOT_FINITE, NO_TOKEN = 1, 2  # why a row has no token: its own logits, or what rules left of them


class Asked(NamedTuple):
    """How one row's token is chosen; the defaults take the likeliest."""

    uniform: float = 0.0
    """In [0, 1): what a token is drawn with."""
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_k: int = 0
    top: int = -1
    """How many likely tokens to give log-probabilities of, beside the row's own; -1: not even that one's."""
    token: int = -1
    """Given where only log-probabilities are asked for."""


class Found(NamedTuple):
    """A row's token, or why it has none; log-probabilities by the model's own logits, where asked for."""

    token: int
    fault: int
    logprob: float
    top: tuple[tuple[int, float], ...]


ROW = Struct("@5Q5d3qqd")  # as the library has it: addresses, what is asked, fault, log-probability
FOUND = Struct("@80x16xqqd")  # token, fault, log-probability


class Chooser:
    """Chooses for rows of logits (B, V) what is asked of each."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        """Of the compiled library; for `chooser_on` to make."""
        self._choose: dict[torch.dtype, Callable[..., None]] = {}
        self._likeliest: dict[torch.dtype, Callable[..., None]] = {}
        pointer, count, number = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        for dtype, name in NAMES.items():
            choose, likeliest = functions[f"choose_{name}"], functions[f"likeliest_{name}"]
            choose.argtypes, choose.restype = [pointer, count, number, count], None
            likeliest.argtypes, likeliest.restype = [pointer, number, count, number, pointer, count], None
            self._choose[dtype], self._likeliest[dtype] = choose, likeliest

    def likeliest(self, logits: Tensor) -> Items[int]:
        """Each row's likeliest token, the lowest of equals; -1 where the row is not finite."""
        logits = _in_rows(logits)
        B, V = logits.shape
        tokens = array("i", bytes(4 * B))
        call, threads = self._likeliest[logits.dtype], torch.get_num_threads()
        call(logits.data_ptr(), logits.stride(0), B, V, tokens.buffer_info()[0], threads)
        return tokens

    def __call__(
        self,
        logits: Tensor,
        changed: Tensor | None,
        places: Mapping[int, int],
        asked: Items[Asked],
        weights: Tensor | None = None,
    ) -> list[Found]:
        """What was found of each row.

        `changed` (E, V), in float32, or float64 for logits of it, holds rows that rules have changed;
        `places` says which. `weights` (B, V), in float64, is for tests: what tokens are drawn
        with is written there.
        """
        V, B = logits.shape[-1], len(asked)
        most = min(max(0, *(one.top for one in asked)), V)
        logits = _in_rows(logits)
        own, step = logits.data_ptr(), logits.stride(0) * logits.element_size()
        edited = [0] * B
        for row, place in places.items():
            assert changed is not None
            edited[row] = changed[place].data_ptr()
        told = [0] * B if weights is None else [row.data_ptr() for row in weights]
        ids, values = array("i", bytes(4 * most * B)), array("d", bytes(8 * most * B))
        ids_at, values_at = ids.buffer_info()[0], values.buffer_info()[0]
        packed = []
        for row, one in enumerate(asked):
            at = most * row
            addresses = own + row * step, edited[row], ids_at + 4 * at, values_at + 8 * at, told[row]
            packed.append(ROW.pack(*addresses, *one, 0, 0.0))
        rows = array("b", b"".join(packed))
        self._choose[logits.dtype](rows.buffer_info()[0], B, V, torch.get_num_threads())
        found = [Found(token, fault, logprob, ()) for token, fault, logprob in FOUND.iter_unpack(rows)]
        return _with_top(found, asked, ids, values) if most else found


def chooser_on(device: torch.device) -> Chooser | None:
    """The C++ choice on a CPU that has a compiler; None elsewhere."""
    return _compiled() if device.type == "cpu" else None


@cache
def _compiled() -> Chooser | None:
    functions = load("choosing").functions
    return None if functions is None else Chooser(functions)


def _in_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _with_top(found: list[Found], asked: Items[Asked], ids: array[int], values: array[float]) -> list[Found]:
    """What was found, with the likeliest tokens of each row from arrays of equal shares."""
    most = len(ids) // len(found)
    tops = []
    for row, (one, wanted) in enumerate(zip(found, asked, strict=True)):
        count = 0 if one.fault else min(max(0, wanted.top), most)
        some = slice(most * row, most * row + count)
        tops.append(one._replace(top=tuple(zip(ids[some], values[some], strict=True))))
    return tops

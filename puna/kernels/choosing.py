"""The C++ choice of tokens: its call from Python, one for all rows of a step.

B rows of logits   E rows of them that rules for single ids have changed   V vocabulary
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from functools import cache, partial
from struct import Struct
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from puna.kernels.library import load, openmp_fork

NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
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

    fault: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Chooser(Protocol):
    """Chooses for rows of logits (B, V) what is asked of each."""

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
        ...


ROW = Struct("@5Q6d4i")  # as the library has it
FOUND = Struct("@80xd4xi4xi")  # its log-probability, token and fault


def chooser_on(device: torch.device) -> Chooser | None:
    """The C++ choice on a CPU that has a compiler; None elsewhere."""
    return _compiled() if device.type == "cpu" else None


@cache
def _compiled() -> Chooser | None:
    functions = load("choosing").functions
    if functions is None:
        return None
    functions.use_threads(ctypes.c_void_p(openmp_fork()))
    calls = {}
    for dtype, name in NAMES.items():
        calls[dtype] = functions[f"choose_{name}"]
        calls[dtype].argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32]
        calls[dtype].restype = None
    return partial(_chosen, calls)


def _chosen(
    calls: Mapping[torch.dtype, Callable[..., None]],
    logits: Tensor,
    changed: Tensor | None,
    places: Mapping[int, int],
    asked: Items[Asked],
    weights: Tensor | None = None,
) -> list[Found]:
    V, size = logits.shape[-1], logits.element_size()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    most = min(max(0, *(one.top for one in asked)), V)
    ids, values = array("i", bytes(4 * most * len(asked))), array("d", bytes(8 * most * len(asked)))
    ids_at, values_at = ids.buffer_info()[0], values.buffer_info()[0]
    own, step = logits.data_ptr(), logits.stride(0) * size
    rows = bytearray(ROW.size * len(asked))
    for row, one in enumerate(asked):
        edited = 0 if changed is None or row not in places else changed[places[row]].data_ptr()
        told = 0 if weights is None else weights[row].data_ptr()
        k = one.top_k if one.top_k < V else 0
        ROW.pack_into(
            rows, row * ROW.size,
            own + row * step, edited, ids_at + 4 * most * row, values_at + 8 * most * row, told,
            *one[:5], 0.0, k, one.token, min(one.top, V), 0,
        )  # fmt: skip
    held = (ctypes.c_char * len(rows)).from_buffer(rows)
    calls[logits.dtype](ctypes.addressof(held), len(asked), V, torch.get_num_threads())
    found = []
    for row, (logprob, token, fault) in enumerate(FOUND.iter_unpack(rows)):
        begin = most * row
        end = begin + min(asked[row].top, V)
        top = tuple(zip(ids[begin:end], values[begin:end], strict=True)) if end > begin and not fault else ()
        found.append(Found(fault, token, logprob, top))
    return found

"""Attention: the plain formula, the fused call, and what a key/value cache owes the model.

A kernel is a function `(q, k, v, *, starts, causal, dropout) -> out`:

    q (B, T, N, H), k and v (B, S, K, H), out (B, T, N, H). N is a multiple of K; query head n reads key/value
    head n // (N/K). `causal` lets query t see keys 0..t; it needs T = S. `starts` (B or 1, T), int32, narrows
    that to the keys starts[t]..t, and rises within a row: there a document or a window begins. Without
    `causal` every query sees all keys, and there are no starts.

    B batch   T positions in the input   S positions attended to
    N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from puna.kernels.causal_op import attention
from puna.kernels.causal_plain import spans


class Kernel(Protocol):
    """One way to compute attention; see the head of this file."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        """(B, T, N, H)."""


class Cache(Protocol):
    """What the model asks of a key/value cache: store, and attend.

    The cache attends itself, so that a paged or an int8 cache need not be gathered first.
    """

    rope_lengths: Tensor | None
    """(B, 1) or (B, T): the sequence length by which dynamic NTK turns a row or a token.

    Fixed from a sequence's first token to its last; None where the model's scaling does not depend on length.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Store k and v (B, T, K, H) at `positions` (B, T), then let q (B, T, N, H) attend to all held.

        A query sees the keys at positions up to its own, within the model's sliding window where it has one.
        Returns (B, T, N, H).
        """


def first_keys(
    length: int, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor | None:
    """The first key that each query sees; None where that is the row's first for all.

    Args:
        length: T.
        window: how many keys a query sees at most, its own among them; None: all of its document before it.
        documents: (B, T), integers; a run of equal numbers is one document. None: a row is one.
        device: where the result is wanted.

    Returns:
        (B or 1, T), int32.
    """
    if documents is None and (window is None or window >= length):
        return None
    own = torch.arange(length, dtype=torch.int32, device=device)[None]  # (1, T)
    first = torch.zeros_like(own)
    if documents is not None:
        changes = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))  # (B, T)
        first = torch.where(changes, own, 0).cummax(dim=1).values  # (B, T)
    return first if window is None else torch.maximum(first, own - (window - 1))


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """The formula, softmax(q·kᵀ/√H)·v, step by step; holds all T×S scores."""
    T, S = q.shape[1], k.shape[1]
    visible = _visible(slice(0, T), S, starts, q.device) if causal else None
    return _formula(q, k, v, visible, dropout)


def _formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))  # (B, S, N, H)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])  # (B, N, T, S)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)  # many positions are summed: not in half
    weights = F.dropout(scores.softmax(dim=-1, dtype=wide).to(v.dtype), dropout)  # (B, N, T, S)
    return torch.einsum("bnts,bsnh->btnh", weights, v)  # (B, T, N, H)


def _visible(block: slice, end: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """Which of the first keys a block of queries sees: (B or 1, 1, T, S)."""
    own, keys = torch.arange(block.start, block.stop, device=device), torch.arange(end, device=device)
    visible = (keys <= own[:, None])[None]  # (1, T, S)
    if starts is not None:
        visible = visible & (keys >= starts[:, block, None])  # (B or 1, T, S)
    return visible[:, None]


def fused(q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """Attention in blocks: nothing of size T×S is held, and what no query sees is not computed."""
    if not causal:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, T, H), (B, K, S, H)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)  # (B, T, N, H)
    if dropout:
        return _dropping(q, k, v, starts, dropout)
    q, k, v = map(_as_autocast_says, (q, k, v))
    return attention(q, k, v, starts)


def _as_autocast_says(x: Tensor) -> Tensor:
    """In the type of products, where autocast is on: torch's operators are cast by it, ours are not."""
    kind = x.device.type
    if (
        not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
        or x.dtype == torch.float64
    ):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _dropping(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, dropout: float) -> Tensor:
    """The formula for one block of queries after the other, computed again for the gradients."""
    outputs = []
    for block in spans(q.shape[1], q.shape[0] * q.shape[2]):
        seen = slice(0, block.stop)
        given = q[:, block], k[:, seen], v[:, seen], starts, block, dropout
        outputs.append(checkpoint(_dropping_block, *given, use_reentrant=False))
    return torch.cat(outputs, dim=1)  # (B, T, N, H)


def _dropping_block(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, block: slice, dropout: float
) -> Tensor:
    return _formula(q, k, v, _visible(block, k.shape[1], starts, q.device), dropout)


KERNELS: dict[str, Kernel] = {"reference": reference, "fused": fused}

"""Attention: the plain formula, the fused call, and what a key/value cache owes the model.

A kernel is a function `(q, k, v, *, mask, causal, dropout, window) -> out`:

    q (B, T, N, H), k and v (B, S, K, H), out (B, T, N, H). N is a multiple of K; query head n reads key/value
    head n // (N/K). `mask`, broadcastable to (B, N, T, S), is boolean, True where a query may look, or is
    added to the scores, in the type of q; every query must see some key. `causal` lets query t see keys
    0..t; it needs T = S and takes no mask. `window` narrows `causal` to the last keys, t - window + 1..t; a
    mask says all by itself.

    B batch   T positions in the input   S positions attended to
    N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 512  # queries that share one mask of a sliding window


class Kernel(Protocol):
    """One way to compute attention; see the head of this file."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
        dropout: float,
        window: int | None = None,
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


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    window: int | None = None,
) -> Tensor:
    """The formula, softmax(q·kᵀ/√H)·v, step by step; holds all T×S scores."""
    T, S, H = q.shape[1], k.shape[1], q.shape[-1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))  # (B, S, N, H)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)  # (B, N, T, S)
    if causal:
        mask = _within(torch.ones(T, S, dtype=torch.bool, device=q.device).tril(), window)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)  # many positions are summed: not in half
    weights = F.dropout(scores.softmax(dim=-1, dtype=wide).to(v.dtype), dropout)  # (B, N, T, S)
    return torch.einsum("bnts,bsnh->btnh", weights, v)  # (B, T, N, H)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    window: int | None = None,
) -> Tensor:
    """torch's fused attention; without mask and dropout nothing of size T×S is held."""
    if causal and window is not None and window < q.shape[1]:
        return _fused_in_blocks(q, k, v, dropout, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, T, H), (B, K, S, H)
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:
        # CUDA's kernels take a mask or grouped heads, not both: torch would fall back to the plain formula.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, N, S, H)
        grouped = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
    )
    return out.transpose(1, 2)  # (B, T, N, H)


def _fused_in_blocks(q: Tensor, k: Tensor, v: Tensor, dropout: float, window: int) -> Tensor:
    """Causal attention within a window shorter than T, at the price of T·(window + BLOCK) scores, not T².

    The first queries see all before them. Every later block of queries is given the keys that one of them
    sees; the mask, the same for all blocks, says which of them sees which.
    """
    T = q.shape[1]
    start = slice(0, window)
    outputs = [fused(q[:, start], k[:, start], v[:, start], mask=None, causal=True, dropout=dropout)]
    height = min(BLOCK, T - window)
    mask = _additive(_band(height, window, q.device), q.dtype)
    for first in range(window, T, BLOCK):
        rows, seen = slice(first, first + BLOCK), slice(first - window + 1, first + BLOCK)
        size = min(BLOCK, T - first)
        part = mask[:size, : size + window - 1]
        outputs.append(fused(q[:, rows], k[:, seen], v[:, seen], mask=part, causal=False, dropout=dropout))
    return torch.cat(outputs, dim=1)  # (B, T, N, H)


def _band(height: int, window: int, device: torch.device) -> Tensor:
    """Row t sees columns t..t + window - 1: (height, height + window - 1)."""
    ones = torch.ones(height, height + window - 1, dtype=torch.bool, device=device)
    return ones.tril(window - 1).triu()


def _within(visible: Tensor, window: int | None) -> Tensor:
    """A causal mask (…, T, T) narrowed to the keys less than `window` before each query."""
    return visible if window is None else visible.triu(1 - window)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one that is added: 0 where a query may look, minus infinity elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -math.inf)


KERNELS: dict[str, Kernel] = {"reference": reference, "fused": fused}


def document_mask(documents: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """The causal mask of packed rows: attention stays within a document, and never looks ahead.

    Its price is T×T numbers per row. It is additive, in the type of the queries, because the fused kernel
    turns a boolean mask into an additive one at every call and keeps each for the backward pass: with this
    one, all layers share the same memory (and on a CPU it is as fast, or up to 4% faster).

    Args:
        documents: (B, T) integers, one per document of a row.
        dtype: the type of the queries.
        window: how many keys a query sees at most, its own among them; None: all of its document before it.

    Returns:
        (B, 1, T, T): 0 where query t may look at key s, minus infinity elsewhere.
    """
    visible = (documents[:, None, :, None] == documents[:, None, None, :]).tril()  # (B, 1, T, T)
    return _additive(_within(visible, window), dtype)

"""Attention: the plain formula, the fused call, and what a key/value cache owes the model.

A kernel is a function `(q, k, v, *, mask, causal, dropout) -> out`:

    q (B, T, N, H), k and v (B, S, K, H), out (B, T, N, H). N is a multiple of K; query head n reads key/value
    head n // (N/K). `mask`, broadcastable to (B, N, T, S), is boolean, True where a query may look, or is
    added to the scores, in the type of q; every query must see some key. `causal` lets query t see keys
    0..t; it needs T = S and takes no mask.

    B batch   T positions in the input   S positions attended to
    N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Kernel(Protocol):
    """One way to compute attention; see the head of this file."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        """(B, T, N, H)."""


class Cache(Protocol):
    """What the model asks of a key/value cache: store, and attend.

    The cache attends itself, so that a paged or an int8 cache need not be gathered first.
    """

    rope_lengths: Tensor | None
    """(B,): the sequence length by which dynamic NTK turns a row, fixed from its first token to its last.

    None where the model's scaling does not depend on length.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Store k and v (B, T, K, H) at `positions` (B, T), then let q (B, T, N, H) attend to all held.

        A query sees the keys at positions up to its own. Returns (B, T, N, H).
        """


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """The formula, softmax(q·kᵀ/√H)·v, step by step; holds all T×S scores."""
    T, S, H = q.shape[1], k.shape[1], q.shape[-1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))  # (B, S, N, H)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)  # (B, N, T, S)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)  # many positions are summed: not in half
    weights = F.dropout(scores.softmax(dim=-1, dtype=wide).to(v.dtype), dropout)  # (B, N, T, S)
    return torch.einsum("bnts,bsnh->btnh", weights, v)  # (B, T, N, H)


def fused(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """torch's fused attention; without mask and dropout nothing of size T×S is held."""
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


KERNELS: dict[str, Kernel] = {"reference": reference, "fused": fused}


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """The causal mask of packed rows: attention stays within a document, and never looks ahead.

    Its price is T×T numbers per row. It is additive, in the type of the queries, because the fused kernel
    turns a boolean mask into an additive one at every call and keeps each for the backward pass: with this
    one, all layers share the same memory (and on a CPU it is as fast, or up to 4% faster).

    Args:
        documents: (B, T) integers, one per document of a row.
        dtype: the type of the queries.

    Returns:
        (B, 1, T, T): 0 where query t may look at key s, minus infinity elsewhere.
    """
    visible = (documents[:, None, :, None] == documents[:, None, None, :]).tril()  # (B, 1, T, T)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -math.inf)

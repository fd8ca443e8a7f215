"""Causal attention and its gradients in plain torch: blocks of queries, on any device, in any number type.

Queries and keys come turned here, and gradients leave so; `turn` and `turn_back` do that.
Computed in float32 at least. A block of queries is scored against the keys that any of them sees, and is as
large as `SCORES` numbers allow, so that what is held grows with T and not with T².

    B batch   T positions   N query heads   K key/value heads   G = N/K   H head width
    t positions of a block   S positions attended to
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SCORES = 1 << 22
"""Scores of a block of queries, as far as `SMALLEST` queries allow."""
SMALLEST, LARGEST = 16, 256
"""Queries of a block."""


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `puna.kernels.causal.attend`, of q and k that are turned."""
    wide, K = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[0], *q.shape[2:0:-1], dtype=wide)
    keys, values = k.to(wide), v.to(wide)
    for block, seen, hidden in _blocks(q, starts):
        queries = q[:, block].to(wide).unflatten(2, (K, -1))  # (B, t, K, G, H)
        scores = _scores(queries, keys[:, seen], hidden)  # (B, K, G, t, S)
        sums = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores - sums).exp_()
        out[:, block] = (
            torch.einsum("bkgts,bskh->btkgh", weights, values[:, seen]).flatten(2, 3).to(out.dtype)
        )
        lse[:, :, block] = sums.squeeze(-1).flatten(1, 2)
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k as they came here, turned, and of v; in the type in which they were summed."""
    wide, K, scale = lse.dtype, k.shape[2], 1 / math.sqrt(q.shape[-1])
    keys, values = k.to(wide), v.to(wide)
    dq, dk, dv = torch.empty_like(q, dtype=wide), torch.zeros_like(keys), torch.zeros_like(values)
    for block, seen, hidden in _blocks(q, starts):
        queries, grads, outs = (x[:, block].to(wide).unflatten(2, (K, -1)) for x in (q, grad, out))
        sums = lse[:, :, block].unflatten(1, (K, -1))[..., None]  # (B, K, G, t, 1)
        weights = (_scores(queries, keys[:, seen], hidden) - sums).exp_()  # (B, K, G, t, S)
        # The softmax passes on what differs from its mean: Σ weight · slope, which is grad · out.
        means = (grads * outs).sum(dim=-1).permute(0, 2, 3, 1)[..., None]  # (B, K, G, t, 1)
        slopes = torch.einsum("btkgh,bskh->bkgts", grads, values[:, seen])
        slopes = slopes.sub_(means).mul_(weights).mul_(scale)
        dq[:, block] = torch.einsum("bkgts,bskh->btkgh", slopes, keys[:, seen]).flatten(2, 3)
        dk[:, seen] += torch.einsum("bkgts,btkgh->bskh", slopes, queries)
        dv[:, seen] += torch.einsum("bkgts,btkgh->bskh", weights, grads)
    return dq, dk, dv


def turn(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Heads (B, T, N, H) turned by their angles (B, T, H), products formed in the type of these."""
    if cos is None or sin is None:
        return x
    return (x * cos[:, :, None] + x.roll(x.shape[-1] // 2, dims=-1) * sin[:, :, None]).to(x.dtype)


def turn_back(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """The transpose of `turn`, which takes gradients back."""
    if cos is None or sin is None:
        return x
    return x * cos[:, :, None] + (x * sin[:, :, None]).roll(x.shape[-1] // 2, dims=-1)


def spans(T: int, rows: int) -> Iterator[slice]:
    """Blocks of queries; `rows` is B·N, of which each is scored at once."""
    begin = 0
    while begin < T:
        height = min(LARGEST, max(SMALLEST, SCORES // (rows * (begin + SMALLEST))))
        yield slice(begin, min(T, begin + height))
        begin += height


def _blocks(q: Tensor, starts: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys that some of them see, and of those what each does not: (B or 1, 1, 1, t, S)."""
    own = torch.arange(q.shape[1], device=q.device)
    for block in spans(q.shape[1], q.shape[0] * q.shape[2]):
        first = 0 if starts is None else int(starts[:, block.start].amin())
        seen = slice(first, block.stop)
        hidden = (own[seen] > own[block, None])[None]  # (1, t, S)
        if starts is not None:
            hidden = hidden | (own[seen] < starts[:, block, None])  # (B or 1, t, S)
        yield block, seen, hidden[:, None, None]


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    scores = torch.einsum("btkgh,bskh->bkgts", queries / math.sqrt(queries.shape[-1]), keys)
    return scores.masked_fill_(hidden, -math.inf)

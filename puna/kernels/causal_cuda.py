"""Causal attention and its gradients by torch's flash attention on CUDA.

Documents are told by their lengths, beside a window. Where that does not apply (a number type or a width of
heads it does not know, first keys that are neither those of documents nor of a window), plain torch does it.

    B batch   T positions   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

WIDEST = 256
"""Of a head that flash attention knows."""


@dataclass(frozen=True)
class Lengths:
    """Sequences of a batch whose rows lie end to end, as flash attention is told of them."""

    ends: Tensor
    """(sequences + 1,), int32: where each begins, and where the last ends."""
    longest: int
    window: int | None
    """Keys that a query sees at most, its own among them; None: all of its sequence before it."""


def suits(q: Tensor, starts: Tensor | None) -> bool:
    """Whether flash attention takes such queries (B, T, N, H)."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(q.device)[0] < 8:
        return False
    return starts is None or _lengths(starts, q.shape[0]) is not None


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `puna.kernels.causal_plain.attend`."""
    if starts is None:
        turned = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, T, H)
        found = torch.ops.aten._scaled_dot_product_flash_attention(*turned, 0.0, True)
        return found[0].transpose(1, 2).contiguous(), found[1]
    flat = (x.flatten(0, 1) for x in (q, k, v))  # (B·T, N, H)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *flat, *_described(starts, q), False, **_window(starts, q)
    )
    return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()  # (B, N, T)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `puna.kernels.causal_plain.attend_backward`."""
    none = torch.empty(0, dtype=torch.int64)  # the state of a generator: nothing is dropped
    if starts is None:
        turned = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        T = q.shape[1]
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *turned, lse, None, None, T, T, 0.0, True, none, none
        )
        dq, dk, dv = (x.transpose(1, 2) for x in found)
    else:
        flat = (x.flatten(0, 1) for x in (grad, q, k, v, out))
        sums = lse.transpose(0, 1).flatten(1)  # (N, B·T)
        found = torch.ops.aten._flash_attention_backward(
            *flat, sums, *_described(starts, q), none, none, **_window(starts, q)
        )
        dq, dk, dv = (x.unflatten(0, q.shape[:2]) for x in found)
    return dq, dk, dv


def _described(starts: Tensor, q: Tensor) -> tuple[Any, ...]:
    """Ends of queries and of keys, their longest, dropout, and that it is causal."""
    lengths = _lengths(starts, q.shape[0])
    assert lengths is not None
    return lengths.ends, lengths.ends, lengths.longest, lengths.longest, 0.0, True


def _window(starts: Tensor, q: Tensor) -> dict[str, int]:
    lengths = _lengths(starts, q.shape[0])
    assert lengths is not None
    return {} if lengths.window is None else {"window_size_left": lengths.window - 1, "window_size_right": 0}


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _lengths(starts: Tensor, batch: int) -> Lengths | None:
    """Worked out once for all layers that are given the same tensor: the device is waited for."""
    if starts not in _known:
        _known[starts] = lengths_of(starts.expand(batch, -1))
    found: Lengths | None = _known[starts]
    return found


def lengths_of(starts: Tensor) -> Lengths | None:
    """Documents and a window that let each query of starts (B, T) see what it sees; None: there are none.

    A document begins where a query sees itself alone, and the window is what the query that sees most does.
    """
    own = torch.arange(starts.shape[1], device=starts.device)
    begins = torch.where(starts == own, own, 0).cummax(dim=1).values  # (B, T)
    window = int((own - starts).amax()) + 1
    if not torch.equal(torch.maximum(begins, own - window + 1), starts.to(own.dtype)):
        return None
    firsts = (starts == own).flatten().nonzero().flatten()
    ends = torch.cat((firsts, firsts.new_tensor([starts.numel()]))).to(torch.int32)
    longest = int(ends.diff().amax())
    return Lengths(ends, longest, None if window >= longest else window)

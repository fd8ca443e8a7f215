"""An embedding that is the output layer's matrix too: its gradient goes where the matrix has one already.

autograd would form a second table for the embedding's gradient and add the two: at a vocabulary of 128,256
that can be more than all that layers keep.

R rows that are looked up   V words   D width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """Rows (…, D) of a table (V, D) by their numbers (…); a backward pass adds to the table's `.grad`.

    It does so past autograd, so that `torch.autograd.grad` finds nothing of it.
    """
    if not (table.requires_grad and torch.is_grad_enabled()):
        return F.embedding(ids, table)
    # What requires a gradient makes autograd come back here; the table itself must not, or autograd would
    # wait with the gradient of the output layer until this one is there as well.
    asked = torch.empty(0, requires_grad=True)
    found: Tensor = _Lookup.apply(ids, asked, _Held(table))
    return found


class _Held(NamedTuple):
    """The table, out of autograd's sight."""

    table: Tensor


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, asked: Tensor, held: _Held) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.held = held
        return F.embedding(ids, held.table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,), table = ctx.saved_tensors, ctx.held.table
        if table.grad is None:
            table.grad = torch.zeros_like(table, dtype=table.grad_dtype or table.dtype)
        table.grad.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(table.grad.dtype))
        return None, None, None

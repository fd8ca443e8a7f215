"""Cross entropy over a large vocabulary, without ever holding all logits.

The logits of 4,096 tokens over 128,000 words are 2 GB in float32, and their gradient as much again. Rows are
independent, so the head and the loss run on a few hundred rows at a time, and their gradients are formed at
once, in the forward pass: the backward pass only scales them. On a CPU this is also twice as fast, because a
chunk of logits stays in the cache.

    R rows (batch × positions)   C rows of a chunk   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_NUMBERS = 1 << 21  # logits at a time: 512 rows of 4,096 words, 8 MiB in float32
SMALLEST_CHUNK = 128  # rows; below, products of a chunk with the head are too thin to be fast
IGNORED = -100

Head = Callable[[Tensor], Tensor]


def cross_entropy_sum(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over the positions where mask is True, in float32 at least.

    Args:
        logits: (..., V), of any floating type.
        targets: (...), int64.
        mask: (...), bool. Nothing marked gives 0, not NaN.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)  # (R, V)
    wanted = targets.masked_fill(~mask, IGNORED).flatten()  # (R)
    return F.cross_entropy(wide, wanted, ignore_index=IGNORED, reduction="sum")


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """`cross_entropy_sum(head(hidden), targets, mask)` by chunks of rows, differentiable once.

    Args:
        head: any module from (C, D) to (C, V); its parameters that require gradients receive them.
        hidden: (..., D).
        targets: (...), int64.
        mask: (...), bool.

    Returns:
        A scalar in float32 (float64 if the model is).
    """
    rows = hidden.flatten(0, -2), targets.flatten(), mask.flatten()  # (R, D), (R), (R)
    if not torch.is_grad_enabled():
        return _sum([cross_entropy_sum(head(h), t, m) for h, t, m in _chunks(head, *rows)])
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _HeadLoss.apply(head, *rows, *parameters)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, hidden: Tensor, targets: Tensor, mask: Tensor, *parameters: Any
    ) -> Tensor:
        gradient = torch.empty_like(hidden)  # (R, D)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        losses, done = [], 0
        for h, t, m in _chunks(head, hidden.detach(), targets, mask):
            h.requires_grad_()
            with torch.enable_grad():
                loss = cross_entropy_sum(head(h), t, m)
            first, *others = torch.autograd.grad(loss, (h, *parameters))
            gradient[done : done + len(h)] = first
            for total, piece in zip(sums, others, strict=True):
                total.add_(piece)
            losses.append(loss.detach())
            done += len(h)
        ctx.save_for_backward(gradient, *sums)
        return _sum(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        hidden, *parameters = ctx.saved_tensors
        return None, hidden * outer, None, None, *(gradient * outer for gradient in parameters)


def _chunks(
    head: nn.Module, hidden: Tensor, targets: Tensor, mask: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Slices of C rows; how many depends on the vocabulary alone, never on the memory that is free."""
    vocabulary = max((p.shape[0] for p in head.parameters() if p.dim() == 2), default=1)
    size = max(SMALLEST_CHUNK, CHUNK_NUMBERS // vocabulary)
    yield from zip(hidden.split(size), targets.split(size), mask.split(size), strict=True)


def _sum(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum()

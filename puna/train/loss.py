"""Cross entropy over a large vocabulary, without ever holding all logits.

The logits of 4,096 tokens over 128,000 words are 2 GB in float32, and their gradient as much again. Rows are
independent, so the head and the loss run on a few hundred rows at a time, and their gradients are formed at
once, in the forward pass: the backward pass only scales them. Of a plain matrix the whole is written out: the
gradient of a chunk's logits takes their place, and that of the matrix is summed in the one tensor it has.

    R rows (batch × positions)   C rows of a chunk   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.devices import product_type
from puna.errors import PunaError
from puna.kernels import gemm
from puna.kernels.likelihood import chunk_loss

CHUNK_NUMBERS = 1 << 24  # logits at a time: 512 rows of 32,000 words, 32 MiB in bfloat16
SMALLEST_CHUNK = 256  # rows; below, products of a chunk with the head are too thin to be fast
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


def penalty_sum(logits: Tensor, mask: Tensor, z: float) -> Tensor:
    """Sum of z · (log Σ e^x)² (arXiv 2204.02311, section 5) where mask is True, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z * wide.logsumexp(dim=-1).masked_fill(~mask, 0).square().sum()


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, mask: Tensor, z: float = 0.0) -> Tensor:
    """The first of `head_losses`."""
    return head_losses(head, hidden, targets, mask, z)[0]


def head_losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, mask: Tensor, z: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sum(head(hidden), targets, mask)` and its `penalty_sum`, by chunks of rows.

    Args:
        head: any module from (C, D) to (C, V); its parameters that require gradients receive them.
        hidden: (..., D).
        targets: (...), int64.
        mask: (...), bool.
        z: the weight of the penalty, which keeps the softmax's normaliser near 1.

    Returns:
        Both together, differentiable once, and the penalty's part, not differentiable: scalars in float32
        (float64 if the model is).
    """
    rows = _Rows(hidden.flatten(0, -2), targets.flatten(), mask.flatten())
    learns = torch.is_grad_enabled()
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.bias is None:
        weight = head.weight
        if learns and (weight.requires_grad or hidden.requires_grad):
            return _LinearLoss.apply(*rows, weight, z)
        return _through_matrix(rows, weight, z, (False, False))[0]
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if learns and (parameters or hidden.requires_grad):
        return _ModuleLoss.apply(head, *rows, z, *parameters)
    return _sums([_losses(head, some, z) for some, _ in _chunks(rows, _rows_for(head))])


class _Rows(NamedTuple):
    """Some positions, whatever sequences they stand in."""

    hidden: Tensor  # (R, D)
    targets: Tensor  # (R)
    mask: Tensor  # (R)


class _LinearLoss(torch.autograd.Function):
    """Of a matrix without bias: products, loss and gradients written out."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, mask: Tensor, weight: Tensor, z: float
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        sums, *ctx.gradients = _through_matrix(_Rows(hidden, targets, mask), weight, z, wanted)
        ctx.mark_non_differentiable(sums[1])
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> Any:
        if ctx.gradients is None:
            raise PunaError(
                "expected one backward pass through the head's loss, got a second: the first gave its "
                "gradients away, so compute the loss once more"
            )
        (hidden, weight), ctx.gradients = ctx.gradients, None
        for gradient in (hidden, weight):
            if gradient is not None:
                gradient.mul_(outer)  # in place: a second tensor of the matrix's size may not fit
        return hidden, None, None, weight, None


def _through_matrix(
    rows: _Rows, weight: Tensor, z: float, wanted: tuple[bool, bool]
) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
    """Both sums, and where wanted the gradients of hidden states (R, D) and matrix (V, D)."""
    dtype = product_type(rows.hidden)
    grad_hidden = torch.empty_like(rows.hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=_sum_type(weight)) if wanted[1] else None
    sums = []
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):  # the type is chosen here
        matrix = weight if _rounds(dtype, weight) else weight.to(dtype)
        # One chunk's memory for all: fresh pages would come more slowly than products that fill them.
        size = max(1, min(_rows_of(len(weight)), len(rows.mask)))
        room = weight.new_empty(size, len(weight), dtype=dtype)
        for some, place in _chunks(rows, size):
            hidden = some.hidden.to(dtype)
            logits = gemm.linear(hidden, (matrix,), None, dtype, into=room[: len(hidden)])  # (C, V)
            loss, penalty = chunk_loss(logits, some.targets, some.mask, z)  # logits are their gradient now
            sums.append((loss + penalty, penalty))
            if grad_hidden is not None:
                grad_hidden[place] = gemm.input_gradient(logits, (matrix,))
            if grad_weight is not None:
                gemm.weight_gradient(logits, hidden, grad_weight)
    return _sums(sums), grad_hidden, grad_weight


class _ModuleLoss(torch.autograd.Function):
    """Of any module: each chunk's gradients by autograd."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, hidden: Tensor, targets: Tensor, mask: Tensor, z: float, *parameters: Any
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)  # (R, D)
        totals = [torch.zeros_like(parameter, dtype=_sum_type(parameter)) for parameter in parameters]
        sums = []
        for some, place in _chunks(_Rows(hidden.detach(), targets, mask), _rows_for(head)):
            some.hidden.requires_grad_()
            with torch.enable_grad():
                loss, penalty = _losses(head, some, z)
            gradient[place], *others = torch.autograd.grad(loss, (some.hidden, *parameters))
            for total, piece in zip(totals, others, strict=True):
                total.add_(piece)
            sums.append((loss.detach(), penalty.detach()))
        ctx.save_for_backward(gradient, *totals)
        both = _sums(sums)
        ctx.mark_non_differentiable(both[1])
        return both

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> Any:
        hidden, *parameters = ctx.saved_tensors
        return None, hidden * outer, None, None, None, *(gradient * outer for gradient in parameters)


def _losses(head: nn.Module, rows: _Rows, z: float) -> tuple[Tensor, Tensor]:
    logits = head(rows.hidden)  # (C, V)
    loss = cross_entropy_sum(logits, rows.targets, rows.mask)
    penalty = penalty_sum(logits, rows.mask, z) if z else torch.zeros_like(loss)
    return loss + penalty, penalty


def _chunks(rows: _Rows, size: int) -> Iterator[tuple[_Rows, slice]]:
    """So many rows each, and their place."""
    for first in range(0, max(1, len(rows.mask)), size):
        place = slice(first, first + size)
        yield _Rows(*(each[place] for each in rows)), place


def _rows_of(vocabulary: int) -> int:
    """C, which depends on the vocabulary alone, never on memory that is free."""
    return max(SMALLEST_CHUNK, CHUNK_NUMBERS // vocabulary // SMALLEST_CHUNK * SMALLEST_CHUNK)


def _rows_for(head: nn.Module) -> int:
    """C where autograd keeps several tensors of a chunk's size, too many for the cache."""
    return _rows_of(max((p.shape[0] for p in head.parameters() if p.dim() == 2), default=1)) // 2


def _rounds(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether products round a matrix of float32 as they read it: no copy of it is needed."""
    return dtype == torch.bfloat16 and weight.device.type == "cpu" and gemm.available()


def _sum_type(weight: Tensor) -> torch.dtype:
    """The type in which gradients of chunks are added up; autograd rounds the sum to the weight's."""
    return torch.promote_types(weight.dtype, torch.float32)


def _sums(losses: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    total, penalty = (torch.stack(each).sum() for each in zip(*losses, strict=True))
    return total, penalty

"""From micro-batches to one averaged, clipped gradient.

Losses travel as sums with the number of trained tokens, over micro-batches and ranks; dividing by the global
number is the last thing that happens to a gradient, while the update reads it. So every trained token weighs
the same, however a batch is split: means of means would favour the tokens of sparse micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.data.batches import Batch
from puna.kernels import adamw
from puna.parallel import World
from puna.progress import counted
from puna.train.memory import memory_errors
from puna.train.objectives import Objective
from puna.train.precision import Precision


@dataclass(frozen=True)
class Totals:
    """Sums over all micro-batches of a step: the loss, what it counts, and the objective's other sums."""

    loss_sum: float
    count: float
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        """Mean loss of a trained token; NaN where none was trained."""
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def means(self) -> dict[str, float]:
        """The objective's other sums, each divided by the count."""
        return {name: value / self.count for name, value in self.metrics.items()} if self.count else {}

    def over(self, world: World) -> Totals:
        """The same sums over all ranks."""
        names = sorted(self.metrics)
        sums = world.sum_scalars([self.loss_sum, self.count, *(self.metrics[name] for name in names)])
        return Totals(sums[0], sums[1], dict(zip(names, sums[2:], strict=True)))


def accumulate(
    objective: Objective,
    model: nn.Module,
    batches: Sequence[Batch],
    precision: Precision,
    *,
    scale: float = 1.0,
    seeds: Iterable[int] = (0,),
) -> Totals:
    """Add the gradient of every micro-batch's loss sum, times `scale`, to the parameters.

    Args:
        seeds: one for each micro-batch, of its random numbers (dropout).

    Raises:
        ResourceError: memory ran out.
    """
    if len(batches) > 1:
        _add_up_in_float32(model)
    losses: list[Tensor] = []
    counts: list[Tensor | int] = []
    metrics: dict[str, list[Tensor | float]] = {}
    for batch, seed in zip(batches, seeds, strict=True):
        torch.manual_seed(seed)
        rows, length = batch.tokens.shape
        with memory_errors(f"training on {counted(rows, 'row')} of {length} tokens at once"):
            with precision.autocast():
                loss, count, others = objective(model, batch.to(precision.device))
            (loss * scale).backward()
        losses.append(loss.detach())
        counts.append(count)
        for name, value in others.items():
            metrics.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)
    # Read only now: reading waits for the device, which would idle between micro-batches.
    return Totals(_sum(losses), _sum(counts), {name: _sum(values) for name, values in metrics.items()})


def known_scale(positions: int) -> float:
    """About 1 / positions, to keep gradients of sums over a large batch in the range of half precision.

    The number of trained tokens is known only after the last micro-batch of the last rank, the number of
    positions before the first. A power of two, because multiplying by it changes no bit.

    >>> known_scale(4096), known_scale(5000)
    (0.000244140625, 0.0001220703125)
    """
    return 2.0 ** -math.ceil(math.log2(positions))


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """The norm of all gradients together; not finite where one of their numbers is not."""
    return adamw.norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def clipping(norm: float, limit: float) -> float:
    """What shrinks a gradient of this norm to one of at most `limit`.

    >>> clipping(4.0, limit=1.0), clipping(0.5, limit=1.0)
    (0.25, 1.0)
    """
    return min(1.0, limit / max(norm, 1e-12))


def _add_up_in_float32(model: nn.Module) -> None:
    """Gradients of weights in bfloat16: added up in it, many small ones would vanish beside their sum."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None and parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32


def _sum(values: Sequence[Tensor | float]) -> float:
    """In float64 on the host, whatever the device can do."""
    return math.fsum(float(value) for value in values)

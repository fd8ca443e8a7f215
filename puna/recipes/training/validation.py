"""Loss, perplexity and bits per byte of a model on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from puna.data.batches import Batch
from puna.parallel import World
from puna.progress import Track, counted, silent
from puna.train.memory import memory_errors
from puna.train.objectives import Objective
from puna.train.precision import Precision


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per scored token, its exponential, and the same information per byte of text.

    Bits per byte does not depend on the tokenizer: every token of a document is scored, the one that ends it
    included, and the sum is divided by the UTF-8 bytes of the text.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def validate(
    objective: Objective,
    model: nn.Module,
    batches: Iterable[Batch],
    text_bytes: int,
    precision: Precision,
    world: World | None = None,
    track: Track = silent,
    label: str = "Validating",
    total: int = 0,
) -> Validation:
    """Score every batch once, each on one rank.

    Args:
        text_bytes: UTF-8 bytes of the text behind all the batches.
        total: scored tokens expected, for the progress.
    """
    world = world or World()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    loss_sum, count = 0.0, 0.0
    with track(label, total, "tok") as bar:
        for batch in islice(batches, world.rank, None, world.size):
            with memory_errors(f"scoring {counted(len(batch.tokens), 'row')} at once"), precision.autocast():
                batch_loss, batch_count, _ = objective(model, batch.to(device))
            loss_sum += float(batch_loss)
            count += float(batch_count)
            bar.advance(float(batch_count))
    model.train(training)
    loss_sum, count = world.sum_scalars([loss_sum, count])
    return _summary(loss_sum, count, text_bytes)


def _summary(loss_sum: float, count: float, text_bytes: int) -> Validation:
    loss = loss_sum / count if count else math.nan
    perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf
    return Validation(loss, perplexity, loss_sum / math.log(2) / max(text_bytes, 1), int(count))

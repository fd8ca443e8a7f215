"""What a model is trained to do: from a batch to a loss.

An objective returns sums and their count, never means: sums over micro-batches and ranks can be added, and
divided once by the global count, so that every trained token weighs the same however a batch is split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from puna.data.batches import Batch
from puna.model.llama import Llama
from puna.train.loss import head_loss

Objective = Callable[[Any, Batch], tuple[Tensor, Tensor | int, dict[str, Tensor | float]]]
"""(model, batch) → (loss summed, differentiable; how many it sums over; further sums over the same count)"""


def language_modelling(model: Llama, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor | float]]:
    """Predict each target marked in the loss mask; nats, summed, and the number of marked targets."""
    hidden = model.model(batch.tokens, batch.positions, batch.documents)  # (B, T, D)
    loss = head_loss(model.lm_head, hidden, batch.targets, batch.loss_mask)
    return loss, batch.loss_mask.sum(), {}


OBJECTIVES: dict[str, Objective] = {"language_modelling": language_modelling}

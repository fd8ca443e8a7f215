"""What a model is trained to do: from a batch to a loss.

An objective returns sums and their count, never means: sums over micro-batches and ranks can be added, and
divided once by the global count, so that every trained token weighs the same however a batch is split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import Tensor

from puna.data.batches import Batch
from puna.model.llama import Llama
from puna.settings import Settings
from puna.train.loss import head_losses

Objective = Callable[[Any, Batch], tuple[Tensor, Tensor | int, dict[str, Tensor | float]]]
"""(model, batch) → (loss summed, differentiable; how many it sums over; further sums over the same count)"""


class LossSettings(Settings):
    """What is added to the cross entropy in training: z · (log Σ e^logits)², which holds logits back.

    It is part of the training loss that is told, and for itself "z_loss"; validation is without it.
    """

    z: float = Field(default=0.0, ge=0.0)


def language_modelling(
    model: Llama, batch: Batch, z: float = 0.0
) -> tuple[Tensor, Tensor | int, dict[str, Tensor | float]]:
    """Predict each target marked in the loss mask; nats, summed, and the number of marked targets.

    With `z` the loss includes the penalty z · (log Σ e^x)² of each of them, and its sum is told as "z_loss".
    """
    hidden = model.model(batch.tokens, batch.positions, batch.documents)  # (B, T, D)
    loss, penalty = head_losses(model.lm_head, hidden, batch.targets, batch.loss_mask, z)
    return loss, batch.loss_mask.sum(), {"z_loss": penalty} if z else {}


OBJECTIVES: dict[str, Objective] = {"language_modelling": language_modelling}

"""What the training loop receives.

Dimensions: B rows, T positions in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of T inputs with the token that follows each.

    `loss_mask` is False where there is nothing to learn: the first token of a document, padding, and context
    that was scored in an earlier row. `documents` numbers the documents within a row, so that attention can
    stay inside each; None means that attention covers the whole row. `extras` holds more tensors with B rows
    (preference pairs, teacher logits). `position` is the global sample position to resume from once the whole
    step that this batch belongs to is done: the same number on every rank. `rows` are the indices of the rows
    in the packed tokens, for reports; padding rows have none.
    """

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    loss_mask: Tensor  # (B, T) bool
    positions: Tensor  # (B, T) int64
    documents: Tensor | None  # (B, T) int64
    position: int
    rows: tuple[int, ...]
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def targets_total(self) -> int:
        """How many targets are trained or scored."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            loss_mask=self.loss_mask.to(device),
            positions=self.positions.to(device),
            documents=None if self.documents is None else self.documents.to(device),
            extras={name: tensor.to(device) for name, tensor in self.extras.items()},
        )

"""An opened model: everything but its tensors is known, and those are read when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from puna.model.config import ModelConfig
from puna.model.weights import Weights


@dataclass(frozen=True)
class Source:
    """What a format's reader gives.

    `weights` may be iterated any number of times. `dtype` is the type most tensors are stored in, `end_ids`
    the tokens that the model's own files say end an answer.
    """

    path: Path
    format: str
    weights: Weights
    dtype: torch.dtype
    tokenizer_path: Path | None
    end_ids: tuple[int, ...]
    bos_id: int | None

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.weights.config

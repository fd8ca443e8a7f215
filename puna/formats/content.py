"""A model on its way into a format, and what of it a format cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from puna.model.config import ModelConfig
from puna.model.weights import Packed, Weights
from puna.tokenizer.tokenizer import Tokenizer

Record = Callable[[str, Tensor | Packed], None]
"""Told of every tensor as it is stored, in the layout of `Weights`, before a format rearranges it."""


@dataclass(frozen=True)
class Content:
    """What is to be written; `generation` is the rest of generation_config.json, besides those tokens."""

    weights: Weights
    tokenizer: Tokenizer | None = None
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.weights.config


@dataclass(frozen=True)
class Obstacle:
    """Something that a format has no place for.

    `what` completes "… cannot hold {what}". `without` is the content when that is left out; None where what
    remains would be no model, so that it cannot be left out.
    """

    what: str
    without: Content | None

"""An opened model: everything but its tensors is known, and those are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from puna.model.config import ModelConfig
from puna.model.weights import Weights
from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """What a format's reader gives.

    Attributes:
        path: what was opened, a directory or a file.
        format: a name in FORMATS.
        weights: may be iterated any number of times, and come in the order of `puna.model.weights.shapes`,
            plain or packed, as they are stored.
        dtype: the type that most tensors are stored in; what packed ones expand to where they are most.
        stored: how many tensors are stored in each type, by name: {"bfloat16": 291}, {"q4_0": 225, …}.
        end_ids: the tokens that the model's own files say end an answer.
        bos_id: the token that begins a text, where the files name one.
        open_tokenizer: opens the model's own tokenizer; None where it has none.
        generation: what generation_config.json says besides begin and end tokens.
        packing: how many quantized matrices there are of each kind, in words, where the schemes in `stored`
            leave it open: {"int4 in groups of 128 with float16 scales": 154}.
        notes: what the files leave unsaid and where it was taken from, a sentence each, for the user.
    """

    path: Path
    format: str
    weights: Weights
    dtype: torch.dtype
    stored: Mapping[str, int]
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    open_tokenizer: Callable[[], Tokenizer] | None = None
    notes: tuple[str, ...] = field(default=())
    generation: Mapping[str, Any] = field(default_factory=dict)
    packing: Mapping[str, int] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.weights.config

    def tokenizer(self) -> Tokenizer | None:
        """The model's own tokenizer, opened anew; None where it has none.

        Raises:
            TokenizerError: it is damaged.
        """
        return None if self.open_tokenizer is None else self.open_tokenizer()

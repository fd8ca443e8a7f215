"""A tiny Llama and an endless source of rows for it, both pure functions of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from puna.data.batches import Batch
from puna.data.loader import Step
from puna.model.config import ModelConfig
from puna.model.initial import initialize
from puna.model.llama import Llama
from puna.train.precision import Precision

VOCABULARY, LENGTH, ROWS = 97, 16, 8
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def tiny_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32, tied: bool = False) -> Llama:
    model = Llama(CONFIG.model_copy(update={"residual_dropout": dropout, "tie_word_embeddings": tied}))
    initialize(model, 0)
    return model.to(dtype)


def precision(dtype: torch.dtype = torch.float32) -> Precision:
    return Precision(CPU, dtype)


class TinySource:
    """Row p counts up in steps of 1 + p % 5 from a start of its own; its first p % 7 targets are masked."""

    def __init__(self, micro_rows: int = ROWS, rank: int = 0, world: int = 1) -> None:
        self.micro_rows, self.rank, self.world = micro_rows, rank, world
        self.barren: set[int] = set()  # positions of steps in which nothing is trained

    def steps(self, position: int) -> Iterator[Step]:
        share = ROWS // self.world
        while True:
            first = position + self.rank * share
            after = position + ROWS
            batches = [self._batch(start, after) for start in range(first, first + share, self.micro_rows)]
            if position in self.barren:
                batches = [replace(b, loss_mask=torch.zeros_like(b.loss_mask)) for b in batches]
            yield Step(batches, after)
            position = after

    def describe(self, step: Step) -> list[str]:
        return [f"row {position}" for position in range(step.position - ROWS, step.position)]

    def _batch(self, start: int, after: int) -> Batch:
        rows = torch.arange(start, start + self.micro_rows)
        places = torch.arange(LENGTH + 1)
        ids = (rows[:, None] * 31 + places * (1 + rows[:, None] % 5)) % VOCABULARY
        positions = places[:-1].expand(self.micro_rows, -1)
        mask = positions >= rows[:, None] % 7
        return Batch(ids[:, :-1], ids[:, 1:], mask, positions, None, after, tuple(rows.tolist()))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

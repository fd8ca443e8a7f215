"""Weights to train from, as GPT-2 sets them: small normal numbers, smaller where layers add to the stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Weights, load_weights, shapes

ONTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def initialize(model: Llama, seed: int) -> None:
    """Set every weight; also materialises a model built on the meta device."""
    load_weights(model, initial_weights(model.config, seed))


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """Initial weights in float32, on the CPU: a pure function of config and seed.

    Matrices and embeddings are normal(0, initializer_range); the two that write to the residual stream of L
    layers are divided by √(2·L), so that the stream's variance does not grow with depth. Gains are 1, biases
    0. Bits may differ between processor types, whose vector units round logarithms differently.
    """
    return Weights(config, _tensors(config, seed))


def _tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    shrink = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, shape in shapes(config).items():
        if name.endswith(".bias"):
            yield name, torch.zeros(shape, device="cpu")
        elif len(shape) == 1:
            yield name, torch.ones(shape, device="cpu")
        else:
            deviation = config.initializer_range * (shrink if name.endswith(ONTO_RESIDUAL) else 1.0)
            values = torch.empty(shape, dtype=torch.float32, device="cpu")
            yield name, values.normal_(0, deviation, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    """One generator per tensor, so that a tensor does not depend on which others were drawn before it."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))

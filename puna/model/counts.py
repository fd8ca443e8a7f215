"""What a config costs: parameters by part and floating-point operations per token, by arithmetic alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from puna.model.config import ModelConfig
from puna.model.weights import shapes


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part; a tied output projection is counted once, as the embedding."""

    embedding: int
    attention: int
    mlp: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.attention + self.mlp + self.norm + self.head


def parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters by part, summed over the shapes of the weights.

    >>> from puna.model.presets import PRESETS
    >>> parameters(PRESETS["llama-7b"]).total
    6738415616
    """
    sums = {part.name: 0 for part in fields(ParameterCounts)}
    for name, shape in shapes(config).items():
        sums[_part(name)] += math.prod(shape)
    return ParameterCounts(**sums)


def _part(name: str) -> str:
    *parents, module, _ = name.split(".")
    if module == "embed_tokens":
        return "embedding"
    if module == "lm_head":
        return "head"
    return "attention" if "self_attn" in parents else "mlp" if "mlp" in parents else "norm"


def flops_per_token(config: ModelConfig, length: int, training: bool) -> float:
    """Floating-point operations per token, averaged over a sequence of `length` tokens.

    A token passes each of the M weights of the matrices once, a multiplication and an addition: 2·M. The
    output projection counts also where it is tied; the embedding is a look-up, and biases, norms, activations
    and rotations are left out. A query's scores and its sum of values take 2·N·H each per layer and key seen;
    it sees (length + 1)/2 keys on average, or fewer in a sliding window. The backward pass costs twice the
    forward pass; so, without a window:

        forward  = 2·M + 2·layers·N·H·(length + 1)
        training = 3·forward = 6·M + 6·layers·N·H·(length + 1)

    An implementation that computes the masked half of the scores, or recomputes activations, does more; this
    counts what the model needs, as utilisation asks.
    """
    D, H, N, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    layer = 2 * D * H * (N + K) + 3 * D * config.intermediate_size
    matrices = config.num_hidden_layers * layer + config.vocab_size * D
    attention = 4 * config.num_hidden_layers * N * H * _keys_seen(length, config.sliding_window) / length
    return float((3 if training else 1) * (2 * matrices + attention))


def _keys_seen(length: int, window: int | None) -> int:
    """Summed over the queries of a sequence: 1, 2, 3, … up to the window, and no more after that."""
    rising = length if window is None else min(length, window)
    return rising * (rising + 1) // 2 + (length - rising) * rising

"""A small tokenizer, and the shape of a small model that fits it."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from puna.model.config import ModelConfig
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train


def small_tokenizer() -> Tokenizer:
    """Trained on some source that every Python carries; most of its pieces are single bytes."""
    return train([inspect.getsource(argparse)], TokenizerSettings(vocab_size=400))


def small_config(tokenizer: Tokenizer, context: int, **more: Any) -> ModelConfig:
    """Two layers, grouped heads."""
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        **more,
    )

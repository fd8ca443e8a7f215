"""A model to serve."""

from __future__ import annotations

import pytest

from puna.engine.llm import LLM
from puna.model.config import ModelConfig
from tests.model.shapes import model_of


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Small and random, without a tokenizer."""
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LLM(model_of(config).eval(), None)

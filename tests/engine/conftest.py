"""A small tokenizer, and a small model with strong opinions, so that greedy choices are never close."""

from __future__ import annotations

import pytest

from puna.engine.llm import LLM
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.tokenizer.tokenizer import Tokenizer
from tests.model.shapes import model_of
from tests.small import small_config, small_tokenizer

CONTEXT = 96


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Most of its pieces are single bytes."""
    return small_tokenizer()


@pytest.fixture(scope="session")
def config(tokenizer: Tokenizer) -> ModelConfig:
    """Fits the tokenizer."""
    return small_config(tokenizer, CONTEXT, attention_dropout=0.1, residual_dropout=0.1)


@pytest.fixture
def model(config: ModelConfig) -> Llama:
    """Random, not in training."""
    return model_of(config).eval()


@pytest.fixture
def llm(model: Llama, tokenizer: Tokenizer) -> LLM:
    """The two together; nothing ends its answers but the tokenizer's EOS."""
    return LLM(model, tokenizer)

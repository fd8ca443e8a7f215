"""A small tokenizer, and a small model with strong opinions, so that greedy choices are never close."""

from __future__ import annotations

import argparse
import inspect

import pytest

from puna.engine.llm import LLM
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train
from tests.model.shapes import model_of

CONTEXT = 96


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Trained on some source that every Python carries; most of its pieces are single bytes."""
    return train([inspect.getsource(argparse)], TokenizerSettings(vocab_size=400))


@pytest.fixture(scope="session")
def config(tokenizer: Tokenizer) -> ModelConfig:
    """Fits the tokenizer."""
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        attention_dropout=0.1,
        residual_dropout=0.1,
    )


@pytest.fixture
def model(config: ModelConfig) -> Llama:
    """Random, not in training."""
    return model_of(config).eval()


@pytest.fixture
def llm(model: Llama, tokenizer: Tokenizer) -> LLM:
    """The two together; nothing ends its answers but the tokenizer's EOS."""
    return LLM(model, tokenizer)

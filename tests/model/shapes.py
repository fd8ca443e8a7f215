"""Small configs that between them use every option, and models whose weights make a mistake visible."""

from __future__ import annotations

import torch

from puna.model.config import ModelConfig
from puna.model.llama import Llama

CONTEXT = 16  # tests go well past it, so that every scaling is at work

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
_OPTIONS = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd vocabulary": {"vocab_size": 101},
    "explicit head width": {"head_dim": 16, "num_key_value_heads": 2},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "sliding window": {"sliding_window": 6, "num_key_value_heads": 2},
    "theta": {"rope_theta": 500_000.0, "rms_norm_eps": 1e-6},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_scaling": _YARN},
    "yarn, two magnitudes": {"rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, untruncated": {
        "rope_scaling": {
            **_YARN,
            "truncate": False,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "attention_factor": 1.25,
        }
    },
    "llama3": {"rope_scaling": _LLAMA3},
    "all at once": {
        "vocab_size": 101,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": _LLAMA3,
    },
}
CONFIGS = {name: ModelConfig(**{**_SMALL, **options}) for name, options in _OPTIONS.items()}
SCALED = ("linear", "dynamic", "yarn", "yarn, two magnitudes", "yarn, untruncated", "llama3")


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32, kernel: str = "fused") -> Llama:
    """A model whose every parameter is random and matters: gains away from one, biases away from zero."""
    model = Llama(config, kernel).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() == 2:
                values *= 1.5 / parameter.shape[1] ** 0.5
            else:
                values = 1 + 0.2 * values
            parameter.copy_(values)
    return model


def ids_of(config: ModelConfig, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of cross-entropies over all positions."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

"""Published shapes, one row each, small ones for laptops, and how the paper trained its four.

Figures are those of the published `params.json` and `config.json` files; `counts.parameters` adds them up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from puna.errors import ModelError, nearest
from puna.model.config import ModelConfig
from puna.model.rope import Llama3Scaling, NoScaling, RopeScaling


def feed_forward_width(hidden_size: int, multiplier: float = 1.0, multiple_of: int = 256) -> int:
    """The paper's rule for F: 2/3 · 4 · D, times `multiplier`, rounded up to `multiple_of`.

    Two thirds, because SwiGLU has three matrices where a plain feed-forward layer has two. Both intermediate
    products are cut to integers, as Meta's code does.

    >>> feed_forward_width(4096), feed_forward_width(8192, 1.3, 4096)
    (11008, 28672)
    """
    width = int(multiplier * int(2 * 4 * hidden_size / 3))
    return math.ceil(width / multiple_of) * multiple_of


class _Rest(TypedDict, total=False):
    theta: float
    scaling: RopeScaling
    tied: bool


def _shape(
    vocabulary: int,
    hidden: int,
    feed_forward: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    context: int,
    eps: float = 1e-5,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=context,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling or NoScaling(),
        tie_word_embeddings=tied,
    )


def _llama3_scaling(factor: float) -> Llama3Scaling:
    return Llama3Scaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


_LLAMA_31: _Rest = {"theta": 500_000.0, "scaling": _llama3_scaling(8.0)}
_LLAMA_32: _Rest = {"theta": 500_000.0, "scaling": _llama3_scaling(32.0), "tied": True}

# fmt: off
PRESETS: dict[str, ModelConfig] = {
    #                             V        D      F   layers   N   K
    "puna-1m":        _shape(  4_096,    128,    344,    3,    4,      context=512, tied=True),
    "puna-15m":       _shape( 32_000,    288,    768,    6,    6,      context=256, tied=True),
    "puna-42m":       _shape( 32_000,    512,  1_376,    8,    8,      context=1024, tied=True),
    "puna-110m":      _shape( 32_000,    768,  2_048,   12,   12,      context=1024, tied=True),
    "tinyllama-1.1b": _shape( 32_000,  2_048,  5_632,   22,   32,   4, context=2048),
    # Meta's files give 1e-6 for the first three of Llama 1 and 1e-5 for the last.
    "llama-7b":       _shape( 32_000,  4_096, 11_008,   32,   32,      context=2048, eps=1e-6),
    "llama-13b":      _shape( 32_000,  5_120, 13_824,   40,   40,      context=2048, eps=1e-6),
    "llama-33b":      _shape( 32_000,  6_656, 17_920,   60,   52,      context=2048, eps=1e-6),
    "llama-65b":      _shape( 32_000,  8_192, 22_016,   80,   64,      context=2048, eps=1e-5),
    "llama-2-7b":     _shape( 32_000,  4_096, 11_008,   32,   32,      context=4096),
    "llama-2-13b":    _shape( 32_000,  5_120, 13_824,   40,   40,      context=4096),
    "llama-2-70b":    _shape( 32_000,  8_192, 28_672,   80,   64,   8, context=4096),
    "codellama-7b":   _shape( 32_016,  4_096, 11_008,   32,   32,      context=16_384, theta=1e6),
    "codellama-13b":  _shape( 32_016,  5_120, 13_824,   40,   40,      context=16_384, theta=1e6),
    "codellama-34b":  _shape( 32_000,  8_192, 22_016,   48,   64,   8, context=16_384, theta=1e6),
    "llama-3-8b":     _shape(128_256,  4_096, 14_336,   32,   32,   8, context=8192, theta=500_000.0),
    "llama-3-70b":    _shape(128_256,  8_192, 28_672,   80,   64,   8, context=8192, theta=500_000.0),
    "llama-3.1-8b":   _shape(128_256,  4_096, 14_336,   32,   32,   8, context=131_072, **_LLAMA_31),
    "llama-3.1-70b":  _shape(128_256,  8_192, 28_672,   80,   64,   8, context=131_072, **_LLAMA_31),
    "llama-3.1-405b": _shape(128_256, 16_384, 53_248,  126,  128,   8, context=131_072, **_LLAMA_31),
    "llama-3.2-1b":   _shape(128_256,  2_048,  8_192,   16,   32,   8, context=131_072, **_LLAMA_32),
    "llama-3.2-3b":   _shape(128_256,  3_072,  8_192,   28,   24,   8, context=131_072, **_LLAMA_32),
}
# fmt: on


@dataclass(frozen=True)
class PaperTraining:
    """How the paper trained one of its models (arXiv 2302.13971, table 2 and section 2.3)."""

    learning_rate: float
    tokens: int
    batch_tokens: int = 4_000_000
    warmup_steps: int = 2000


PAPER_TRAINING: dict[str, PaperTraining] = {
    "llama-7b": PaperTraining(learning_rate=3e-4, tokens=1_000_000_000_000),
    "llama-13b": PaperTraining(learning_rate=3e-4, tokens=1_000_000_000_000),
    "llama-33b": PaperTraining(learning_rate=1.5e-4, tokens=1_400_000_000_000),
    "llama-65b": PaperTraining(learning_rate=1.5e-4, tokens=1_400_000_000_000),
}


def preset(name: str) -> ModelConfig:
    """The config of a preset.

    Raises:
        ModelError: no preset has this name.
    """
    if name not in PRESETS:
        raise ModelError(
            f"no preset is called {name!r}.{nearest(name, PRESETS)} Presets: {', '.join(PRESETS)}"
        )
    return PRESETS[name]

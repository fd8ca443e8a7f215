"""The two layouts of rotary pairs in query and key projections.

`Weights`, like Hugging Face, pairs dimension i of a head with i + H/2 (half-split). Meta's files, llama2.c
and GGUF pair 2i with 2i + 1 (interleaved). The output rows of q_proj and k_proj, and their biases, are moved
head by head: q by the number of query heads N, k by the number of key/value heads K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from puna.kernels.panels import empty
from puna.model.config import ModelConfig
from puna.model.weights import Packed


def interleaved(name: str, value: Tensor | Packed, config: ModelConfig) -> Tensor | Packed:
    """A tensor of `Weights`, by its name there, as interleaved files hold it; a copy for q and k."""
    return _moved(name, value, config, _interleave)


def half_split(name: str, value: Tensor | Packed, config: ModelConfig) -> Tensor | Packed:
    """The inverse of `interleaved`."""
    return _moved(name, value, config, _split)


def _moved(
    name: str, value: Tensor | Packed, config: ModelConfig, move: Callable[[Tensor, int], Tensor]
) -> Tensor | Packed:
    heads = _heads(name, config)
    if heads is None:
        return value
    if isinstance(value, Packed):
        scales = None if value.scales is None else move(value.scales, heads)
        return replace(value, data=move(value.data, heads), scales=scales)
    return move(value, heads)


def _heads(name: str, config: ModelConfig) -> int | None:
    module = name.split(".")[-2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module)


def _interleave(rows: Tensor, heads: int) -> Tensor:
    """(heads · H, …): row i of the first half of a head goes to 2i, row i of the second to 2i + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _split(rows: Tensor, heads: int) -> Tensor:
    moved = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2)
    # In large pages: these are many, and the copies of all layers live until the model is packed.
    return empty(tuple(moved.shape), moved.dtype, moved.device).copy_(moved).flatten(0, 2)

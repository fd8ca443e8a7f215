"""Quantized matrices on their way into a model: straight into the layers that run with them, one at a time.

A model that holds any is frozen when it is loaded: whole numbers do not learn, and what lies between them
should not learn by mistake. Gradients pass through, so that adapters can be trained on top.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights
from puna.quantize.matrices import in_panels, suits
from puna.quantize.nf4 import Nf4Linear
from puna.quantize.packed import PackedEmbedding, PackedLinear

QUANTIZED = (PackedLinear, PackedEmbedding, Nf4Linear)
EMBEDDING = "model.embed_tokens.weight"
RUNS = (torch.float32, torch.bfloat16, torch.float16)
"""The number types of models whose matrices may be of whole numbers."""


def runs(name: str, packed: Packed, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model of this type on this device runs with a matrix as it is."""
    if packed.scheme == "nf4":
        return name != EMBEDDING
    return device.type == "cpu" and dtype in RUNS and suits(packed)


def load_quantized(model: Llama, weights: Weights) -> None:
    """As `load_weights`, but matrices may be packed, if they are such as `runs` admits.

    Raises:
        ModelError: as `load_weights`.
    """
    load_weights(model, weights, _place)
    if any(isinstance(module, QUANTIZED) for module in model.modules()):
        model.requires_grad_(False)


def _place(model: Llama, name: str, value: Tensor | Packed) -> bool:
    parent, _, leaf = name.rpartition(".")
    if isinstance(value, Tensor):
        return leaf == "bias" and _place_bias(model, parent, value)
    if name == EMBEDDING:
        _place_embedding(model, value)
    elif value.scheme == "nf4":
        model.set_submodule(parent, Nf4Linear(value, None))
    else:
        model.set_submodule(parent, PackedLinear(in_panels(value)))
    return True


def _place_bias(model: Llama, parent: str, bias: Tensor) -> bool:
    linear = model.get_submodule(parent)
    if isinstance(linear, PackedLinear):
        (matrix,) = linear.matrices()
        model.set_submodule(parent, PackedLinear(replace(matrix, bias=bias)))
    elif isinstance(linear, Nf4Linear):
        linear.bias = nn.Parameter(bias, requires_grad=False)
    else:
        return False
    return True


def _place_embedding(model: Llama, value: Packed) -> None:
    embedding = PackedEmbedding(in_panels(value), model.model.norm.weight.dtype)
    model.set_submodule("model.embed_tokens", embedding)
    if model.config.tie_word_embeddings:
        model.set_submodule("lm_head", PackedLinear(embedding.matrix))

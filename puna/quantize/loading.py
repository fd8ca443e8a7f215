"""Quantized matrices on their way into a model: straight into the layers that run with them, one at a time.

A model that holds any is frozen when it is loaded: whole numbers do not learn, and what lies between them
should not learn by mistake. Gradients pass through, so that adapters can be trained on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from puna.kernels.panels import WIDTH
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights, shapes
from puna.quantize.matrices import Room, laid, room_for, suits
from puna.quantize.nf4 import Nf4Linear
from puna.quantize.packed import PackedEmbedding, PackedLinear

QUANTIZED = (PackedLinear, PackedEmbedding, Nf4Linear)
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What `pack` joins."""
EMBEDDING = "model.embed_tokens.weight"
RUNS = (torch.float32, torch.bfloat16, torch.float16)
"""The number types of models whose matrices may be of whole numbers."""


def runs(name: str, packed: Packed, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model of this type on this device runs with a matrix as it is; GGUF's Q8_0 and Q4_0 too."""
    if packed.scheme == "nf4":
        return name != EMBEDDING
    return device.type == "cpu" and dtype in RUNS and suits(packed)


def load_quantized(model: Llama, weights: Weights) -> None:
    """As `load_weights`, but matrices may be packed, if they are such as `runs` admits.

    Raises:
        ModelError: as `load_weights`.
    """
    rooms = _Rooms(shapes(model.config))

    def place(model: Llama, name: str, value: Tensor | Packed) -> bool:
        return _place(model, name, value, rooms)

    load_weights(model, weights, place)
    if any(isinstance(module, QUANTIZED) for module in model.modules()):
        model.requires_grad_(False)


class _Rooms:
    """Panels for matrices that will be one: laid below each other as they come, they are joined unmoved."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._next: list[str] = []  # those that belong below what is laid, the nearest first
        self._left: Room | None = None

    def of(self, name: str, value: Packed) -> Room | None:
        """Where to lay a matrix; None where that does not matter."""
        if name not in self._next[:1]:
            self._begin(name, value)
        if self._left is None or not self._next:
            return None
        del self._next[0]
        own = room_for(value, 0)
        if [(x.dtype, x.shape[1:]) for x in own] != [(x.dtype, x.shape[1:]) for x in self._left]:
            self._left = None  # of another kind, as are those below it to those above it
            return None
        count = -(-value.shape[0] // WIDTH)
        data, scales = self._left
        self._left = data[count:], scales[count:]
        return data[:count], scales[:count]

    def _begin(self, name: str, value: Packed) -> None:
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        together = next((group for group in TOGETHER if group[0] == leaf), ())
        self._next = [f"{module}.{each}.weight" for each in together]
        outputs = [self._shapes[each][0] for each in self._next]
        whole = bool(outputs) and not any(count % WIDTH for count in outputs[:-1])
        self._left = room_for(value, sum(outputs)) if whole else None


def _place(model: Llama, name: str, value: Tensor | Packed, rooms: _Rooms) -> bool:
    parent, _, leaf = name.rpartition(".")
    if isinstance(value, Tensor):
        return leaf == "bias" and _place_bias(model, parent, value)
    if name == EMBEDDING:
        _place_embedding(model, value)
    elif value.scheme == "nf4":
        model.set_submodule(parent, Nf4Linear(value, None))
    else:
        model.set_submodule(parent, PackedLinear(laid(value, rooms.of(name, value))))
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
    embedding = PackedEmbedding(laid(value), model.model.norm.weight.dtype)
    model.set_submodule("model.embed_tokens", embedding)
    if model.config.tie_word_embeddings:
        model.set_submodule("lm_head", PackedLinear(embedding.matrix))

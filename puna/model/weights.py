"""Weights as a value: a config and a stream of named tensors, the form in which formats exchange models.

Names are Hugging Face's; the rotary layout is half-split. A tied output projection does not appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from puna.errors import ModelError, nearest
from puna.model.config import ModelConfig
from puna.model.llama import Llama


@dataclass(frozen=True)
class Packed:
    """A matrix in a low-bit scheme, as files hold it; `puna.formats.packed` expands it.

    `data` and `scales` begin with a dimension of `shape[0]` rows, so that rows can be moved without being
    unpacked; `scales` is None where the blocks of `data` hold their own. `shape` is that of the matrix.
    """

    scheme: str
    data: Tensor
    scales: Tensor | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """A model's config and its tensors by name, streamed so that one need not hold them all."""

    config: ModelConfig
    tensors: Iterable[tuple[str, Tensor | Packed]]

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        return iter(self.tensors)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in weights of this config, in the model's order; by arithmetic."""
    D, V = config.hidden_size, config.vocab_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    layer = _layer_shapes(config)
    for index in range(config.num_hidden_layers):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (D,)
    return found if config.tie_word_embeddings else found | {"lm_head.weight": (V, D)}


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    attention = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    return {
        "input_layernorm.weight": (D,),
        **_linear("self_attn", attention, config.attention_bias),
        "post_attention_layernorm.weight": (D,),
        **_linear("mlp", mlp, config.mlp_bias),
    }


def _linear(parent: str, matrices: dict[str, tuple[int, int]], bias: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in matrices.items():
        found[f"{parent}.{name}.weight"] = shape
        if bias:
            found[f"{parent}.{name}.bias"] = shape[:1]
    return found


@runtime_checkable
class Rewritten(Protocol):
    """A module that took the place of one of the model's, and keeps its tensors in another way."""

    def plain(self, rows: int | None = None) -> Iterator[tuple[str, Tensor | Packed]]:
        """All tensors of the module that it stands for, by their names within it, as they were.

        Of each matrix only so many rows, those of `spread`, where `rows` says how many.
        """
        ...


def weights_of(model: Llama) -> Weights:
    """The weights of a model, without copying but for what is kept in another way.

    They change as it trains; a rewritten model gives what it was rewritten from.
    """
    return Weights(model.config, _plain(model))


def spread(count: int, rows: int) -> Tensor:
    """The numbers of `rows` of `count` rows, evenly over all; of every one where there are no more.

    >>> spread(10, 4)
    tensor([0, 2, 5, 7])
    """
    taken = min(count, rows)
    return torch.arange(taken) * count // max(1, taken)


def sampled(model: Llama, rows: int) -> Iterator[tuple[str, Tensor | Packed]]:
    """What tells two models apart without reading either whole: vectors, and `spread` rows of each matrix."""
    return _plain(model, rows)


def _plain(model: Llama, rows: int | None = None) -> Iterator[tuple[str, Tensor | Packed]]:
    for name, value in _tensors(model, "", rows):
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield name, value if isinstance(value, Packed) else value.detach()


def _tensors(module: nn.Module, prefix: str, rows: int | None) -> Iterator[tuple[str, Tensor | Packed]]:
    if isinstance(module, Rewritten):
        yield from ((prefix + name, tensor) for name, tensor in module.plain(rows))
        return
    for name, tensor in module.named_parameters(prefix.removesuffix("."), recurse=False):
        some = rows is not None and tensor.dim() > 1
        yield name, tensor[spread(len(tensor), rows or 0).to(tensor.device)] if some else tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{prefix}{name}.", rows)


Place = Callable[[Llama, str, Tensor | Packed], bool]
"""Is offered a tensor of a model by name; True where it has put it there."""


@torch.no_grad()
def load_weights(model: Llama, weights: Weights, place: Place | None = None) -> None:
    """Set every parameter of a model from weights of the same shapes.

    A parameter in memory is overwritten, keeping its type and device. A parameter on the meta device is
    replaced by the given tensor, in the parameter's type and on the tensor's device, copying only to change
    the type. What `place` takes is its own affair. After an error the model is partly loaded.

    Raises:
        ModelError: a name is unknown, missing or repeated, a shape differs, or a tensor is packed and nothing
            takes it; or the model was rewritten.
    """
    if any(isinstance(module, Rewritten) for module in model.modules()):
        raise ModelError("weights cannot be put into a packed model; unpack it first, or load another one")
    expected = shapes(model.config)
    missing = dict.fromkeys(expected)
    for name, tensor in weights:
        if name not in missing:
            raise ModelError(_not_expected(name, expected))
        del missing[name]
        _check_shape(name, tensor, expected[name])
        if place is None or not place(model, name, tensor):
            _set(model, name, _not_packed(name, tensor))
    if missing:
        first = next(iter(missing))
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ModelError(f"the weights lack {first}{others}, which a model of this config has")
    if model.config.tie_word_embeddings and type(model.model.embed_tokens) is nn.Embedding:
        model.lm_head.weight = model.model.embed_tokens.weight  # an adopted embedding is a new parameter


def _set(model: Llama, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    parameter = module.get_parameter(leaf)
    if parameter.is_meta:
        setattr(module, leaf, nn.Parameter(tensor.to(parameter.dtype), parameter.requires_grad))
    else:
        parameter.copy_(tensor)


def _check_shape(name: str, tensor: Tensor | Packed, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} by the config")


def _not_packed(name: str, tensor: Tensor | Packed) -> Tensor:
    if isinstance(tensor, Packed):
        raise ModelError(f"{name} is packed as {tensor.scheme}, expected plain numbers; unpack it first")
    return tensor


def _not_expected(name: str, expected: dict[str, tuple[int, ...]]) -> str:
    if name in expected:
        return f"{name} occurs twice in the weights"
    if name == "lm_head.weight":
        return (
            "lm_head.weight is in the weights, but the config ties it to model.embed_tokens.weight; drop it"
        )
    return f"{name} is in the weights, but not in a model of this config.{nearest(name, expected)}"

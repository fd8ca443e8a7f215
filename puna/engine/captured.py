"""A packed model on a CPU as one call over a step's rows: captured once, checked at every prompt.

What is captured are the addresses of its tensors. They are the model's own: an update of the weights in place
counts. Where a module or a tensor was replaced since, `holds` says so, and a new one is to be made.

R rows of a step   C rows whose logits are wanted   D width   H head width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from itertools import chain, repeat
from operator import contains, is_
from typing import Any

import torch
from torch import Tensor, nn

from puna.engine.cache import PagedCache
from puna.errors import ModelError
from puna.kernels.decoder import Decoder, Layer, Norm, Parts, decoder
from puna.kernels.matrix import Matrix
from puna.kernels.pages import Pages
from puna.kernels.panels import INPUTS
from puna.kernels.rowwise import DTYPES
from puna.model.config import ModelConfig
from puna.model.llama import Block, Llama
from puna.model.llama import Decoder as Layers
from puna.model.rope import Rope
from puna.quantize.packed import PackedAttention, PackedEmbedding, PackedLinear, PackedMLP, PackedNorm

ANGLES = 1024  # positions whose angles are computed together, so that they depend on nothing else
KNOWN = (nn.ModuleList, Block, PackedNorm, PackedAttention, PackedMLP, PackedLinear, Rope)


class Captured:
    """The pass of one model, as it is now, with one cache."""

    def __init__(self, model: Llama, cache: PagedCache, call: Decoder) -> None:
        """For `of` to make."""
        self._model, self._cache, self._call = model, cache, call
        self._watched, self._weight = _Watched(model), model.model.norm.weight
        self._max_norm = _max_norm(model.model.embed_tokens)
        self._angles = _Angles(model.model.rope)

    @classmethod
    def of(cls, model: Llama, cache: PagedCache) -> Captured | None:
        """The captured pass; None where a part of the model is of another kind, or there are no kernels."""
        if cache.fault or model.model.norm.weight.device.type != "cpu" or not _is_known(model):
            return None
        parts = _parts(model, cache)
        call = decoder(parts, cache.dtype) if parts is not None else None
        return None if call is None else cls(model, cache, call)

    def holds(self) -> bool:
        """Whether it still is the model's."""
        return self._watched.as_found() and _max_norm(self._model.model.embed_tokens) == self._max_norm

    def run(self, ids: list[int], positions: list[int], chosen: Items[int]) -> tuple[Tensor, Tensor]:
        """Normalised hidden states (R, D) of rows, and the logits (C, V) of the chosen ones.

        They hold until the next pass. Whose the rows are was told to the cache.

        Raises:
            ModelError: the model has another number type since.
        """
        self._check(self._weight.dtype)
        given = ids if self._call.embeds(ids) else self._embedded(ids)
        return self._call(given, *self._angles(positions, self._cache.rope_lengths), self._cache.step, chosen)

    def _check(self, dtype: torch.dtype) -> None:
        if dtype != self._cache.dtype:
            raise ModelError(
                f"the model became {dtype} while it answered from a {self._cache.dtype} cache; ask again"
            )

    def _embedded(self, ids: list[int]) -> Tensor:
        """What the model's own embedding makes of rows: (R, D)."""
        x: Tensor = self._model.model.embed_tokens(torch.tensor([ids]))
        self._check(x.dtype)
        return x[0].contiguous()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) of normalised hidden states (R, D)."""
        found: Tensor = self._model.lm_head(hidden)
        return found


class _Angles:
    """Cosines and sines by position, computed once."""

    def __init__(self, rope: Rope) -> None:
        self._rope, self._known = rope, 0
        with torch.inference_mode(False):
            self._cos = self._sin = torch.empty(0, rope.head_dim)

    def __call__(
        self, positions: list[int], lengths: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], list[int]]:
        """Cosines and sines, (P, H) each, and where in them those of rows at these positions stand.

        `lengths` (1, R) are dynamic NTK's: nothing can be kept then.
        """
        if self._rope.scaling.by_length:
            cos, sin = self._rope(torch.tensor([positions]), torch.float32, lengths)
            return (cos[0], sin[0]), list(range(len(positions)))
        while max(positions) >= self._known:
            self._extend()
        return (self._cos, self._sin), positions

    @torch.inference_mode(False)  # tensors made within could not be written to without
    @torch.no_grad()
    def _extend(self) -> None:
        begin, end = self._known, self._known + ANGLES
        if end > len(self._cos):
            self._cos, self._sin = (
                torch.cat((x, x.new_empty(max(ANGLES, len(x)), x.shape[1]))) for x in (self._cos, self._sin)
            )
        cos, sin = self._rope(torch.arange(begin, end)[None], torch.float32)
        self._cos[begin:end], self._sin[begin:end] = cos[0], sin[0]
        self._known = end


class _Watched:
    """What the capture rests on: modules and tensors in their places, with nothing hooked on to them."""

    def __init__(self, model: Llama) -> None:
        modules = list(model.modules())
        self._own = [vars(module) for module in modules]
        self._hooks = [hooks for module in modules for hooks in _hooks(module)]
        both = [places for each in modules for places in (each._modules, each._parameters)]
        self._places = [places for places in both if places]
        self._held = list(self._found())
        self._tensors = list(model.parameters())
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def as_found(self) -> bool:
        """Without a loop in Python: this is done for every part of a prompt."""
        found = list(self._found())
        return (
            len(found) == len(self._held)
            and all(map(is_, found, self._held))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and not any(map(contains, self._own, repeat("forward")))
            and not any(self._hooks)
        )

    def _found(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict[str, Any].values, self._places))


def _hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks  # torch has no public way to ask


def _is_known(model: Llama) -> bool:
    """Whether all between embedding and logits is what is known here, with nothing hooked on to it."""
    head = model.get_submodule("lm_head")
    if type(model) is not Llama or type(model.model) is not Layers or type(head) is not PackedLinear:
        return False
    known = all(type(module) in KNOWN for module in _inner(model))
    return known and not any("forward" in vars(each) or any(_hooks(each)) for each in model.modules())


def _inner(model: Llama) -> Iterator[nn.Module]:
    """All between embedding and logits; what a packed linear layer holds is its own affair."""
    waiting: list[nn.Module] = [model.model.layers, model.model.norm, model.model.rope, model.lm_head]
    while waiting:
        module = waiting.pop()
        yield module
        if type(module) is not PackedLinear:
            waiting += module.children()


@torch.no_grad()
def _parts(model: Llama, cache: PagedCache) -> Parts | None:
    """What the kernel is told; None where shapes or number types are not those of one plain model."""
    config, dtype = model.config, cache.dtype
    if len(model.model.layers) != len(cache.pages) or not cache.pages or dtype not in DTYPES:
        return None
    parts = Parts(
        _embedding(model.model.embed_tokens, dtype),
        [_layer(block, pages) for block, pages in zip(model.model.layers, cache.pages, strict=True)],
        _norm(model.model.norm),
        _matrices(model.lm_head),
        (config.num_attention_heads, config.num_key_value_heads),
        config.head_dim,
    )
    embedded = model.model.embed_tokens(torch.zeros(1, 1, dtype=torch.long))
    return parts if embedded.dtype == dtype and _fits(parts, config, dtype) else None


def _embedding(module: nn.Module, dtype: torch.dtype) -> Matrix | Tensor | None:
    """What tokens are looked up in, where no more is done than that; None where it is anything else."""
    if type(module) is nn.Embedding and module.max_norm is None:
        return module.weight if module.weight.dtype == dtype and _is_plain(module.weight) else None
    if type(module) is PackedEmbedding:
        expanded = module.get_buffer("like").dtype
        return module.matrix if expanded == dtype and _is_read(module.matrix, dtype) else None
    return None


def _max_norm(embedding: nn.Module) -> float | None:
    """What a lookup holds rows to: a setting of the module, which can be changed in its place."""
    return embedding.max_norm if isinstance(embedding, nn.Embedding) else None


def _layer(block: nn.Module, pages: Pages) -> Layer:
    attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
    return Layer(
        _norm(block.get_submodule("input_layernorm")),
        _matrices(attention.get_submodule("qkv")),
        _matrices(attention.get_submodule("o_proj")),
        pages,
        _norm(block.get_submodule("post_attention_layernorm")),
        _matrices(mlp.get_submodule("gate_up")),
        _matrices(mlp.get_submodule("down_proj")),
    )


def _norm(norm: nn.Module) -> Norm:
    assert isinstance(norm, PackedNorm)
    return Norm(norm.weight, norm.eps)


def _matrices(linear: nn.Module) -> list[Matrix]:
    assert isinstance(linear, PackedLinear)
    return linear.matrices()


def _fits(parts: Parts, config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether every part has the shape that the configuration says, and lies as it is to be read."""
    (N, K), H, D, F = parts.heads, parts.head_dim, config.hidden_size, config.intermediate_size
    products = [(parts.head, D, config.vocab_size)]
    embedding = parts.embedding
    if isinstance(embedding, Matrix):
        products.append(([embedding], D, config.vocab_size))
    elif embedding is not None and embedding.shape != (config.vocab_size, D):
        return False
    norms = [parts.norm]
    for layer in parts.layers:
        products += [
            (layer.qkv, D, (N + 2 * K) * H),
            (layer.o_proj, N * H, D),
            (layer.gate_up, D, 2 * F),
            (layer.down_proj, F, D),
        ]
        norms += [layer.input_norm, layer.post_attention_norm]
    return all(
        norm.weight.shape == (D,) and norm.weight.dtype == dtype and _is_plain(norm.weight) for norm in norms
    ) and all(
        sum(matrix.outputs for matrix in matrices) == outputs
        and all(matrix.inputs == inputs and _is_read(matrix, dtype) for matrix in matrices)
        for matrices, inputs, outputs in products
    )


def _is_read(matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether its product takes rows of this type, and finds its tensors as they should be."""
    whole = matrix.scales is not None
    rows = whole or (matrix.panels.dtype == dtype and matrix.panels.shape[3] == INPUTS[dtype])
    biased = matrix.bias is None or matrix.bias.dtype == dtype
    tensors = (matrix.panels, matrix.scales, matrix.bias)
    return rows and biased and all(_is_plain(x) for x in tensors if x is not None)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()

"""A built model with its matrices as products read them, and back: same numbers, faster answers on a CPU.

What was packed answers and is not trained. Each part is replaced before the next is touched, and the pages of
a file that it was mapped from are given back, so that at no time there are two copies of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from puna.kernels import panels
from puna.model.llama import MLP, Attention, Llama, RMSNorm
from puna.model.weights import Rewritten
from puna.quantize.packed import (
    PackedAttention,
    PackedEmbedding,
    PackedLinear,
    PackedMLP,
    PackedNorm,
    joined,
)
from puna.quantize.release import release


@torch.no_grad()
def pack(model: Llama) -> None:
    """Rewrite a model for answering; what is packed already, or cannot be here, stays as it is."""
    for name in [name for name, module in model.named_modules() if type(module) in _PACKED]:
        _replace(model, name, _packed(model.get_submodule(name)))
    _pack_head(model)


@torch.no_grad()
def unpack(model: Llama) -> None:
    """Undo `pack`: the same tensors, bit for bit, in modules that can be trained."""
    _unpack_head(model)
    for name in [name for name, module in model.named_modules() if type(module) in _PACKED.values()]:
        _replace(model, name, _unpacked(model, model.get_submodule(name)))


def is_packed(model: Llama) -> bool:
    """Whether any of its matrices is."""
    return any(type(module) is PackedLinear for module in model.modules())


_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    Attention: PackedAttention,
    MLP: PackedMLP,
    RMSNorm: PackedNorm,
}


def _replace(model: Llama, name: str, module: nn.Module) -> None:
    old = model.get_submodule(name)
    if module is not old:
        model.set_submodule(name, module.train(old.training))
        for parameter in old.parameters():
            release(parameter)


def _packed(module: nn.Module) -> nn.Module:
    """What takes the place of one; itself where a part of it is of another kind than the model file has."""
    if not all(_suits(part) for part in module.children()):
        return module
    return _PACKED[type(module)](module)


def _suits(module: nn.Module) -> bool:
    return type(module) is nn.Linear and panels.suits(module.weight)


def _unpacked(model: Llama, module: nn.Module) -> nn.Module:
    with torch.device("meta"):
        if isinstance(module, PackedNorm):
            norm = RMSNorm(len(module.weight), module.eps)
            norm.weight = module.weight
            return norm
        if isinstance(module, PackedAttention):
            plain: nn.Module = Attention(model.config, module.kernel)
        else:
            plain = MLP(model.config)
    assert isinstance(module, Rewritten)
    _adopt(plain, module.plain())
    return plain


def _adopt(module: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        parent, _, leaf = name.rpartition(".")
        # A part of a joined tensor gets memory of its own, so that it can end by itself.
        setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor.detach().clone()))


def _pack_head(model: Llama) -> None:
    head, embedding = model.lm_head, model.model.embed_tokens
    shared = head.weight is embedding.weight
    if not _suits(head) or (shared and type(embedding) is not nn.Embedding):
        return
    packed = joined(head)
    _replace(model, "lm_head", packed)
    if shared:
        _replace(model, "model.embed_tokens", PackedEmbedding(packed.weight, packed.out_features))


def _unpack_head(model: Llama) -> None:
    head, embedding = model.get_submodule("lm_head"), model.model.embed_tokens
    if not isinstance(head, PackedLinear):
        return
    shared = head.weight is embedding.weight
    with torch.device("meta"):
        linear = nn.Linear(head.in_features, head.out_features, bias=False)
        plain = nn.Embedding(head.out_features, head.in_features)
    _adopt(linear, head.plain())
    _replace(model, "lm_head", linear)
    if shared:
        plain.weight = linear.weight
        _replace(model, "model.embed_tokens", plain)

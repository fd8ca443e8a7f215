"""A built model with its matrices as products read them, and back: same numbers, faster answers on a CPU.

Each part is replaced before the next is touched, and the pages of a file that it was mapped from are given
back, so that at no time there are two copies of the model. Matrices of whole numbers lie in panels since
they were loaded: packing puts those together that take the same input, unpacking takes them apart.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from puna.model.llama import MLP, Attention, Llama, RMSNorm
from puna.quantize.matrices import suits
from puna.quantize.nf4 import Nf4Linear
from puna.quantize.packed import (
    PackedAttention,
    PackedEmbedding,
    PackedLinear,
    PackedMatrix,
    PackedMLP,
    PackedNorm,
    joined,
    linear_of,
)
from puna.quantize.release import release, trim


@torch.no_grad()
def pack(model: Llama) -> None:
    """Rewrite a model for answering; what is packed already, or cannot be here, stays as it is.

    A packed matrix passes gradients on and does not learn: what was to be trained is refused in training
    mode, what was frozen before can have adapters trained on top of it.
    """
    for name in [name for name, module in model.named_modules() if type(module) in _PACKED]:
        _replace(model, name, _packed(model.get_submodule(name)))
    _pack_head(model)
    trim()


@torch.no_grad()
def unpack(model: Llama) -> None:
    """Undo `pack`: the modules of the model file, with the same tensors, bit for bit.

    Those in floating point can be trained if they could before. Whole numbers cannot: their layers remain
    packed, each for itself, and pass gradients on to what is trained with them.
    """
    _unpack_head(model)
    for name in [name for name, module in model.named_modules() if type(module) in _PACKED.values()]:
        _replace(model, name, _unpacked(model, model.get_submodule(name)))


def is_packed(model: Llama) -> bool:
    """Whether any of its matrices is."""
    return any(type(module) is PackedLinear for module in model.modules())


def schemes(model: Llama) -> list[str]:
    """The kinds of whole numbers that its matrices are of, those that most weights have first."""
    weights: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, PackedMatrix) and module.matrix.scales is not None:
            weights[module.matrix.kind] += module.outputs * module.matrix.inputs
        elif isinstance(module, Nf4Linear):
            weights["nf4"] += module.out_features * module.in_features
    return [scheme for scheme, _ in weights.most_common()]


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
    """What takes the place of one; itself where a part of it is of another kind than is known here."""
    if not all(_suits(part) for part in module.children()):
        return module
    return _PACKED[type(module)](module)


def _suits(module: nn.Module) -> bool:
    return type(module) is PackedLinear or (type(module) is nn.Linear and suits(module.weight))


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
    assert isinstance(module, PackedAttention | PackedMLP)
    for part in module.linears():
        plain.set_submodule(part.name, linear_of(part))
    return plain


def _pack_head(model: Llama) -> None:
    head, embedding = model.get_submodule("lm_head"), model.model.get_submodule("embed_tokens")
    if type(head) is not nn.Linear or not _suits(head):
        return
    tied = model.config.tie_word_embeddings
    if tied and not (type(embedding) is nn.Embedding and embedding.weight is head.weight):
        return
    packed = joined(head)
    _replace(model, "lm_head", packed)
    if tied:
        _replace(model, "model.embed_tokens", PackedEmbedding(packed.matrices()[0], head.weight.dtype))


def _unpack_head(model: Llama) -> None:
    head, embedding = model.get_submodule("lm_head"), model.model.get_submodule("embed_tokens")
    if not isinstance(head, PackedLinear) or head.matrices()[0].scales is not None:
        return
    shared = isinstance(embedding, PackedEmbedding) and embedding.matrix.panels is head.matrices()[0].panels
    (part,) = head.apart({"": head.out_features})
    linear = linear_of(part)
    _replace(model, "lm_head", linear)
    if shared and isinstance(linear, nn.Linear):
        with torch.device("meta"):
            plain = nn.Embedding(linear.out_features, linear.in_features)
        plain.weight = linear.weight
        _replace(model, "model.embed_tokens", plain)

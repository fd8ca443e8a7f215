"""The names of Meta's tensors, which llama2.c's checkpoints bear too ⇄ those of `Weights`."""

from __future__ import annotations

import re

_WHOLE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_OURS = {**{ours: theirs for theirs, ours in _WHOLE.items()}, **{b: a for a, b in _IN_LAYER.items()}}
_LAYER = re.compile(r"(?:model\.)?layers\.(0|[1-9][0-9]{0,8})\.(.+)\.weight", re.ASCII)
DERIVED = ("rope.freqs", "freqs_cos", "freqs_sin")  # buffers that the config determines


def from_meta(name: str) -> str | None:
    """The name in `Weights`; None where Meta's Llama has no such tensor.

    >>> from_meta("layers.3.feed_forward.w2.weight")
    'model.layers.3.mlp.down_proj.weight'
    """
    match = _LAYER.fullmatch(name)
    if match is None or name.startswith("model."):
        return _WHOLE.get(name)
    return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight" if match[2] in _IN_LAYER else None


def to_meta(name: str) -> str:
    """The name in Meta's files of a tensor of `Weights`; itself where Meta has none (biases).

    >>> to_meta("model.layers.3.mlp.down_proj.weight")
    'layers.3.feed_forward.w2.weight'
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OURS.get(name, name)
    return f"layers.{match[1]}.{_OURS[match[2]]}.weight" if match[2] in _OURS else name

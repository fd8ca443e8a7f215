"""GGUF's metadata and tensor names ⇄ ModelConfig and the names of `Weights`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.errors import ModelError, SettingsError
from puna.formats.gguf.header import brief
from puna.formats.gguf.rope import BASE, decimal, read_scaling, scaling_metadata
from puna.model.config import ModelConfig
from puna.settings import parse

ARCHITECTURE = "llama"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = "model.layers."

_COUNTS = {  # field of the config → key
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "max_position_embeddings": "llama.context_length",
}
_OPTIONAL_COUNTS = {
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "sliding_window": "llama.attention.sliding_window",
}
_EPSILON = "llama.attention.layer_norm_rms_epsilon"
_VOCABULARY = "llama.vocab_size"
_ROTARY, _VALUE = "llama.rope.dimension_count", "llama.attention.value_length"
_THETA = 10_000.0  # llama.cpp's, where the key is absent
_LARGEST_THETA = 1e15  # ModelConfig's bound: its powers stay finite
# Keys that change what is computed and have no place in a Llama.
_REFUSED = {
    "llama.expert_count": "it is a mixture of experts",
    "llama.attention.clamp_kqv": "its queries, keys and values are clamped",
    "llama.attention.max_alibi_bias": "it has ALiBi positions",
    "llama.attention.scale": "its attention has a scale of its own",
    "llama.logit_scale": "its logits are scaled",
    "llama.embedding_scale": "its embedding is scaled",
    "llama.residual_scale": "its residual stream is scaled",
}


def gguf_name(name: str) -> str:
    """The name of a tensor of `Weights` in GGUF.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    module, _, leaf = name.rpartition(".")
    if not module.startswith(_LAYER):
        return f"{_OUTER[module]}.{leaf}"
    index, _, inner = module.removeprefix(_LAYER).partition(".")
    return f"blk.{index}.{_INNER[inner]}.{leaf}"


def check_architecture(metadata: Mapping[str, Any], origin: Path) -> None:
    """Refuse what is no Llama.

    Raises:
        ModelError: it is another architecture, or a Llama with parts that this model does not have.
    """
    name = metadata.get("general.architecture")
    if name != ARCHITECTURE:
        raise ModelError(
            f"{origin}: the architecture {brief(name)} is not supported; the nearest that is: 'llama'"
        )
    for key, why in _REFUSED.items():
        value = metadata.get(key, 0)
        if not isinstance(value, int | float) or value:
            raise ModelError(f"{origin}: {why} ({key} = {brief(value)}), which a Llama is not")


def read_config(
    metadata: dict[str, Any], found: Mapping[str, tuple[int, ...]], divisors: Tensor | None, origin: Path
) -> ModelConfig:
    """The config, from the metadata, and from which tensors there are (name → shape).

    Raises:
        ModelError: a value is missing, impossible, or asks for what this model does not have.
    """
    values = _counts(metadata, origin)
    layers = {name.split(".")[1] for name in found if name.startswith("blk.")}
    if len(layers) != values["num_hidden_layers"]:  # it bounds what `shapes` has to list
        raise ModelError(
            f"{origin}: expected {values['num_hidden_layers']} layers by its metadata, found tensors of "
            f"{len(layers)}"
        )
    values["rms_norm_eps"] = _float(metadata, _EPSILON, None, origin)
    values["rope_theta"] = _float(metadata, BASE, _THETA, origin)
    values["vocab_size"] = _vocab_size(metadata, found, origin)
    values["tie_word_embeddings"] = OUTPUT not in found
    values["attention_bias"] = "blk.0.attn_q.bias" in found
    values["mlp_bias"] = "blk.0.ffn_gate.bias" in found
    config = _config(values, origin)
    _check_rotary(metadata, config, origin)
    scaling = read_scaling(
        metadata, divisors, config.rope_theta, config.head_dim, config.max_position_embeddings, origin
    )
    return _config({**values, "rope_scaling": scaling.model_dump()}, origin)


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys `llama.*` for a config."""
    counts = {key: getattr(config, field) for field, key in (_COUNTS | _OPTIONAL_COUNTS).items()}
    return {
        **{key: value for key, value in counts.items() if value is not None},
        _VOCABULARY: config.vocab_size,
        _VALUE: config.head_dim,
        _ROTARY: config.head_dim,
        _EPSILON: config.rms_norm_eps,
        BASE: config.rope_theta,
        **scaling_metadata(config.rope_scaling, config.rope_theta, config.head_dim),
    }


def _config(values: dict[str, Any], origin: Path) -> ModelConfig:
    try:
        return parse(ModelConfig, values, str(origin))
    except SettingsError as error:
        raise ModelError(str(error)) from None


def _counts(metadata: dict[str, Any], origin: Path) -> dict[str, Any]:
    for key in _COUNTS.values():
        if key not in metadata:
            raise ModelError(f"{origin}: {key} is missing, which every Llama's GGUF file has")
    found: dict[str, Any] = {}
    for field, key in (_COUNTS | _OPTIONAL_COUNTS).items():
        value = metadata.get(key)
        if value is not None and type(value) is not int:
            raise ModelError(f"{origin}: {key} is {brief(value)}; a Llama has one number for all layers")
        if value or field in _COUNTS:  # some writers put 0 for none
            found[field] = value
    return found


def _float(metadata: dict[str, Any], key: str, default: float | None, origin: Path) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, float) or not math.isfinite(value) or abs(value) >= _LARGEST_THETA:
        raise ModelError(f"{origin}: {key} is {brief(value)}; expected a number, as every Llama has")
    return decimal(value)


def _vocab_size(metadata: dict[str, Any], found: Mapping[str, tuple[int, ...]], origin: Path) -> int:
    if EMBEDDING not in found:
        raise ModelError(f"{origin}: {EMBEDDING} is missing from the tensors")
    rows = found[EMBEDDING][0]
    if metadata.get(_VOCABULARY, rows) != rows:
        raise ModelError(
            f"{origin}: {_VOCABULARY} is {brief(metadata[_VOCABULARY])}, but {EMBEDDING} has {rows} rows"
        )
    return rows


def _check_rotary(metadata: dict[str, Any], config: ModelConfig, origin: Path) -> None:
    """Whole heads are turned, and values are as wide as keys."""
    for key in (_ROTARY, _VALUE):
        if metadata.get(key, config.head_dim) != config.head_dim:
            raise ModelError(
                f"{origin}: {key} is {brief(metadata[key])}; expected the head width {config.head_dim}"
            )

"""config.json ⇄ ModelConfig, in both spellings of the rotary embedding.

Old: `rope_theta` beside `rope_scaling` (whose type is called `rope_type`, and before that `type`).
New: both inside `rope_parameters`. Both are written, so that old and new versions of transformers read the
same model; defaults of what a file leaves out are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from puna.devices import DTYPES
from puna.errors import ModelError, SettingsError
from puna.model.config import ModelConfig
from puna.model.rope import SCALINGS
from puna.settings import parse

ARCHITECTURES = ("LlamaForCausalLM",)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = {  # with the values that transformers takes for them
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,  # our own: transformers' Llama has none
    "initializer_range": 0.02,
}
_ROPE_THETA = 10_000.0
_ACTIVATIONS = ("silu", "swish")  # two names of one function


def read_config(values: dict[str, Any], origin: str) -> ModelConfig:
    """The config that the content of a config.json describes.

    Raises:
        ModelError: another architecture, something this model does not have, or impossible values.
    """
    _check_architecture(values, origin)
    for name in _REQUIRED:
        if values.get(name) is None:
            raise ModelError(f"{origin}: {name} is missing, which every Llama's config.json has")
    found = {name: values[name] for name in _REQUIRED}
    found |= {name: _given(values, name, default) for name, default in _OPTIONAL.items()}
    found["rope_theta"], found["rope_scaling"] = _read_rope(values, found["max_position_embeddings"], origin)
    try:
        return parse(ModelConfig, found, origin)
    except SettingsError as error:
        raise ModelError(str(error)) from None


def write_config(
    config: ModelConfig, dtype: torch.dtype, bos_id: int | None, end_ids: Sequence[int]
) -> dict[str, Any]:
    """The content of config.json for a model whose tensors are stored as `dtype`."""
    scaling = config.rope_scaling.model_dump(exclude_none=True)
    name = DTYPE_NAMES[dtype]
    shape = {key: getattr(config, key) for key in (*_REQUIRED, *_OPTIONAL)}
    if not config.residual_dropout:
        del shape["residual_dropout"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **shape,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        **token_ids(bos_id, end_ids),
        "use_cache": True,
        "dtype": name,
        "torch_dtype": name,  # the same before transformers 4.56
    }


def token_ids(bos_id: int | None, end_ids: Sequence[int]) -> dict[str, Any]:
    """Begin and end tokens as both config.json and generation_config.json spell them."""
    ends = list(end_ids)
    return {"bos_token_id": bos_id, "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else ends}


def read_end_ids(values: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens that a config.json or generation_config.json names: one, a list, or none."""
    value = values.get("eos_token_id")
    items = [_id(item) for item in (value if isinstance(value, list) else [value])]
    return tuple(item for item in items if item is not None)


def read_bos_id(values: dict[str, Any]) -> int | None:
    """The token that begins a text, where the file names one."""
    return _id(values.get("bos_token_id"))


def _id(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _given(values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    return default if value is None else value


def _check_architecture(values: dict[str, Any], origin: str) -> None:
    names = values.get("architectures") or (
        ["LlamaForCausalLM"] if values.get("model_type") == "llama" else [values.get("model_type")]
    )
    name = str(names[0] if isinstance(names, list) else names)
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{origin}: the architecture {name!r} is not supported; the nearest that is: {ARCHITECTURES[0]!r}"
        )
    activation = _given(values, "hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"{origin}: hidden_act is {activation!r}; a Llama's gate takes 'silu'")
    if values.get("quantization_config") is not None:
        raise ModelError(
            f"{origin}: its weights are quantized; expected the plain float model it was made from"
        )


def _read_rope(values: dict[str, Any], context: Any, origin: str) -> tuple[Any, dict[str, Any]]:
    """The base, and the scaling with the fields it has; where both spellings stand, the old one rules."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{origin}: rope_scaling must be an object, got {rope!r}")
    share = _given(rope, "partial_rotary_factor", _given(values, "partial_rotary_factor", 1.0))
    if share != 1:
        raise ModelError(f"{origin}: partial_rotary_factor is {share!r}; a Llama turns whole heads (1.0)")
    theta = _given(rope, "rope_theta", _given(values, "rope_theta", _ROPE_THETA))
    kind = _given(rope, "rope_type", _given(rope, "type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        return theta, {"rope_type": str(kind)}  # refused by ModelConfig, which names those there are
    scaling_class: Any = SCALINGS[kind]
    fields = scaling_class.model_fields
    # Fields that a scaling does not have (such as yarn's "finetuned") change nothing in transformers either.
    scaling = {name: rope[name] for name in fields if rope.get(name) is not None}
    scaling["rope_type"] = kind
    if "original_max_position_embeddings" in fields:
        inside = scaling.get("original_max_position_embeddings", context)
        scaling["original_max_position_embeddings"] = _given(
            values, "original_max_position_embeddings", inside
        )
    if kind == "yarn" and "factor" not in scaling:
        scaling["factor"] = _ratio(context, scaling["original_max_position_embeddings"], origin)
    return theta, scaling


def _ratio(context: Any, original: Any, origin: str) -> float:
    try:
        return context / original
    except (TypeError, ZeroDivisionError, OverflowError):
        raise ModelError(
            f"{origin}: yarn needs a factor, or positive integers in max_position_embeddings and "
            f"original_max_position_embeddings; got {context!r} and {original!r}"
        ) from None

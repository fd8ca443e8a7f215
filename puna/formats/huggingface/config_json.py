"""config.json ⇄ ModelConfig, for Llama and Mistral, in both spellings of the rotary embedding.

A Mistral is a Llama with a sliding window: with one a config is written as MistralForCausalLM, without one as
LlamaForCausalLM, whichever it was read from.

Old: `rope_theta` beside `rope_scaling` (whose type is called `rope_type`, and before that `type`).
New: both inside `rope_parameters`. Both are written, so that old and new versions of transformers read the
same model; defaults of what a file leaves out are those of transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch

from puna.devices import DTYPES
from puna.errors import ModelError, SettingsError
from puna.model.config import ModelConfig
from puna.model.rope import SCALINGS
from puna.settings import parse

LLAMA, MISTRAL, YI = "LlamaForCausalLM", "MistralForCausalLM", "YiForCausalLM"
ARCHITECTURES = {  # each with the one that computes the same
    LLAMA: LLAMA,
    "LLaMAForCausalLM": LLAMA,  # the spelling of the earliest conversions
    YI: LLAMA,
    MISTRAL: MISTRAL,
}
MODEL_TYPES = {"llama": LLAMA, "Yi": LLAMA, "mistral": MISTRAL}
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
_OF_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
"""Values that transformers takes for what a Mistral's file leaves out; null means none of them."""
_BIASES = ("attention_bias", "mlp_bias")  # unknown to transformers' Mistral
_ROPE_THETA = 10_000.0
_ACTIVATIONS = ("silu", "swish")  # two names of one function


def read_config(values: dict[str, Any], origin: str) -> ModelConfig:
    """The config that the content of a config.json describes.

    Raises:
        ModelError: another architecture, something this model does not have, or impossible values.
    """
    mistral = _architecture(values, origin) == MISTRAL
    _check_computation(values, origin)
    for name in _REQUIRED:
        if values.get(name) is None:
            raise ModelError(f"{origin}: {name} is missing, which every Llama's config.json has")
    if mistral:
        values = _completed(values, origin)
    found = {name: values[name] for name in _REQUIRED}
    found |= {name: _given(values, name, default) for name, default in _OPTIONAL.items()}
    found["sliding_window"] = values["sliding_window"] if mistral else None  # transformers' Llama has none
    found["rope_theta"], found["rope_scaling"] = _read_rope(values, found["max_position_embeddings"], origin)
    try:
        return parse(ModelConfig, found, origin)
    except SettingsError as error:
        raise ModelError(str(error)) from None


def is_yi(values: dict[str, Any]) -> bool:
    """Whether the file calls the model a Yi: it computes as a Llama, and its norms may have other names."""
    return values.get("architectures") == [YI] or values.get("model_type") == "Yi"


def write_config(
    config: ModelConfig, dtype: torch.dtype, bos_id: int | None, end_ids: Sequence[int]
) -> dict[str, Any]:
    """The content of config.json for a model whose tensors are stored as `dtype`.

    Raises:
        ModelError: it has both a sliding window and biases, for which transformers has no model.
    """
    scaling = config.rope_scaling.model_dump(exclude_none=True)
    name = DTYPE_NAMES[dtype]
    return {
        **_shape(config),
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        **token_ids(bos_id, end_ids),
        "use_cache": True,
        "dtype": name,
        "torch_dtype": name,  # the same before transformers 4.56
    }


def _shape(config: ModelConfig) -> dict[str, Any]:
    shape = {key: getattr(config, key) for key in (*_REQUIRED, *_OPTIONAL)}
    if not config.residual_dropout:
        del shape["residual_dropout"]
    if config.sliding_window is None:
        return {"architectures": [LLAMA], "model_type": "llama", **shape}
    given = [name for name in _BIASES if shape.pop(name)]
    if given:
        raise ModelError(
            f"config.json cannot express sliding_window {config.sliding_window} together with "
            f"{' and '.join(given)}: {MISTRAL} has no biases; leave one of them out"
        )
    window = {"sliding_window": config.sliding_window}
    return {"architectures": [MISTRAL], "model_type": "mistral", **shape, **window}


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


def read_generation(values: dict[str, Any]) -> dict[str, Any]:
    """The rest of a generation_config.json: how its model likes to be sampled."""
    ours = ("bos_token_id", "eos_token_id", "transformers_version", "_from_model_config")
    return {name: value for name, value in values.items() if name not in ours}


def _id(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _given(values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    return default if value is None else value


def _architecture(values: dict[str, Any], origin: str) -> str:
    """LLAMA or MISTRAL, by the name of the class or, where there is none, by that of the family."""
    kind, names = values.get("model_type"), values.get("architectures")
    by_kind = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if not names and by_kind is not None:
        return by_kind
    name = str(names[0] if isinstance(names, list) and names else names or kind)[:80]
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, (LLAMA, MISTRAL), n=1, cutoff=0.0)[0]
        raise ModelError(
            f"{origin}: the architecture {name!r} is not supported; the nearest that is: {near!r}"
        )
    if by_kind not in (None, ARCHITECTURES[name]):
        raise ModelError(
            f"{origin}: architectures says {name}, but model_type {kind!r}; transformers believes the "
            "latter, others the former: correct the wrong one"
        )
    return ARCHITECTURES[name]


def _completed(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """What a Mistral's file says, with what it leaves out, and without what transformers' Mistral ignores."""
    values = {**_OF_MISTRAL, **values, **dict.fromkeys(_BIASES)}
    kinds = values.get("layer_types")
    mixed = isinstance(kinds, list) and any(kind != "sliding_attention" for kind in kinds)
    if mixed and values["sliding_window"] is not None:
        raise ModelError(
            f"{origin}: layer_types gives its layers different kinds of attention; supported is a "
            "sliding_window in all of them or in none"
        )
    return values


def _check_computation(values: dict[str, Any], origin: str) -> None:
    activation = _given(values, "hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"{origin}: hidden_act is {activation!r}; a Llama's gate takes 'silu'")


def _read_rope(values: dict[str, Any], context: Any, origin: str) -> tuple[Any, dict[str, Any]]:
    """The base, and the scaling with the fields it has; where both spellings stand, the old one rules."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{origin}: rope_scaling must be an object, got {rope!r}")
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ModelError(
            f"{origin}: rope_parameters differ by kind of layer ({nested[0]!r}); expected one set"
        )
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

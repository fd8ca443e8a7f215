"""Meta's params.json ⇄ ModelConfig, and where what it leaves unsaid is taken from.

It has no feed-forward width, only a rule for it; no context length; of the rotary scaling only that there is
one; and nothing of tied embeddings. Tensors tell the first and the last. The rest comes from puna.json where
Puna wrote the files, else from the preset of the same shape, else from what most such models have.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from puna.errors import ModelError, SettingsError
from puna.model.config import ModelConfig
from puna.model.presets import PRESETS, feed_forward_width
from puna.model.rope import Llama3Scaling, NoScaling, RopeScaling
from puna.settings import parse

PARAMS = "params.json"
_THETA, _EPS, _MULTIPLE = 10_000.0, 1e-5, 256  # what Meta's code takes where the file says nothing
_LONG_THETA = 500_000.0  # Llama 3's
_LARGEST = 1 << 31
_SCALING = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
)
_UNSAID = ("max_position_embeddings", "rope_scaling", "tie_word_embeddings", "initializer_range")
_UNUSED = ("residual_dropout", "attention_dropout")


@dataclass(frozen=True)
class Told:
    """What tensors tell: rows of the embedding, of w1 and of wq, and whether the head is the embedding."""

    vocabulary: int
    feed_forward: int
    query_rows: int
    tied: bool


def read_params(
    values: dict[str, Any], told: Told, known: dict[str, Any] | None, origin: str
) -> tuple[ModelConfig, list[str]]:
    """The config, and what of it was taken from where, a sentence each.

    Args:
        values: the content of params.json.
        told: by the tensors.
        known: the whole config as puna.json keeps it, where there is one.
        origin: the file, for messages.

    Raises:
        ModelError: a value is missing or impossible, or `known` is the config of another model.
    """
    config, notes = _said(values, told, origin)
    scaled = values.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ModelError(f"{origin}: use_scaled_rope is {_cut(scaled)}; expected true or false")
    if known is not None:
        return _completed(config, scaled, known, origin), notes
    context, scaling, source = unsaid(config, scaled)
    notes.append(f"context length {context}: {source}")
    if scaled:
        notes.append(f"rotary scaling by {scaling.factor:g}: {source}")  # type: ignore[union-attr]
    return config.model_copy(update={"max_position_embeddings": context, "rope_scaling": scaling}), notes


def unsaid(config: ModelConfig, scaled: bool) -> tuple[int, RopeScaling, str]:
    """Context length and scaling of a model of this shape by the presets, and where they were found."""
    for name, preset in PRESETS.items():
        if isinstance(preset.rope_scaling, Llama3Scaling) == scaled and _same_shape(config, preset):
            return preset.max_position_embeddings, preset.rope_scaling, f"from the preset {name}"
    context = 8192 if config.rope_theta >= _LONG_THETA else 2048
    source = f"the usual one, since {PARAMS} does not say and no preset has this shape"
    return context, _SCALING if scaled else NoScaling(), source


def write_params(config: ModelConfig, explicit_theta: bool) -> dict[str, Any]:
    """The content of params.json: Meta's keys only, and of those that older code does not know, what it must.

    `explicit_theta` writes the rotary base also where it is that of Llama 1 and 2.
    """
    multiple, multiplier = feed_forward_rule(config.hidden_size, config.intermediate_size)
    theta = config.rope_theta if explicit_theta or config.rope_theta != _THETA else None
    grouped = config.num_key_value_heads != config.num_attention_heads
    values = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads if grouped else None,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "use_scaled_rope": True if isinstance(config.rope_scaling, Llama3Scaling) else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def feed_forward_rule(hidden: int, width: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier by which Meta's rule gives a feed-forward width, plain ones first.

    >>> feed_forward_rule(4096, 11008), feed_forward_rule(8192, 28672), feed_forward_rule(64, 172)
    ((256, None), (1024, 1.3), (4, None))
    """
    multiples = (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1)
    for multiplier, multiple in itertools.product((None, 1.3, 1.2, 1.5), multiples):
        if feed_forward_width(hidden, multiplier or 1.0, multiple) == width:
            return multiple, multiplier
    base = int(2 * 4 * hidden / 3)
    exact = (width + 0.5) / base  # half way to the next integer, so that rounding does no harm
    shorter = (round(exact, digits) for digits in range(1, 16))
    found = next((m for m in shorter if feed_forward_width(hidden, m, 1) == width), exact)
    assert feed_forward_width(hidden, found, 1) == width
    return 1, found


def _said(values: dict[str, Any], told: Told, origin: str) -> tuple[ModelConfig, list[str]]:
    """What params.json and the tensors tell."""
    for name in ("dim", "n_layers", "n_heads"):
        if values.get(name) is None:
            raise ModelError(f"{origin}: {name} is missing, which every Llama's {PARAMS} has")
    heads = _integer(values, "n_heads", 0, origin)
    rows = told.vocabulary
    vocabulary = _given(values, "vocab_size", -1)
    config = {
        "vocab_size": rows if vocabulary == -1 else vocabulary,
        "hidden_size": _integer(values, "dim", 0, origin),
        "intermediate_size": told.feed_forward,
        "num_hidden_layers": values["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("n_kv_heads"),
        "head_dim": None if told.query_rows % heads else told.query_rows // heads,
        "rms_norm_eps": _given(values, "norm_eps", _EPS),
        "rope_theta": _given(values, "rope_theta", _THETA),
        "sliding_window": values.get("sliding_window"),
        "tie_word_embeddings": told.tied,
    }
    try:
        return parse(ModelConfig, config, origin), _disagreement(values, told.feed_forward, origin)
    except SettingsError as error:
        raise ModelError(str(error)) from None


def _disagreement(values: dict[str, Any], found: int, origin: str) -> list[str]:
    """A note where the rule for the feed-forward width does not give what the tensors have."""
    hidden = _integer(values, "dim", 0, origin)
    multiple = _integer(values, "multiple_of", _MULTIPLE, origin)
    multiplier = _given(values, "ffn_dim_multiplier", 1.0)
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not 0 < multiplier < 1e4:
        raise ModelError(f"{origin}: ffn_dim_multiplier is {_cut(multiplier)}; expected a number above 0")
    width = feed_forward_width(hidden, multiplier, multiple)
    if width == found:
        return []
    return [f"feed-forward width {found}: from the tensors; {PARAMS} would make it {width}"]


def _completed(config: ModelConfig, scaled: bool, known: Any, origin: str) -> ModelConfig:
    """The config from puna.json, once it is sure that it is the config of these files."""
    try:
        full = parse(ModelConfig, known, "the model in puna.json")
    except SettingsError as error:
        raise ModelError(f"{error}; remove puna.json if it is not of these files") from None
    for name in ("vocab_size", *_SHAPE, "sliding_window"):
        ours, theirs = getattr(config, name), getattr(full, name)
        if ours != theirs:
            raise ModelError(
                f"{origin}: {name} is {ours}, but {theirs} in puna.json, which is of another model; remove it"
            )
    if isinstance(full.rope_scaling, Llama3Scaling) != scaled or full.rope_scaling.rope_type not in (
        "llama3",
        "default",
    ):
        raise ModelError(
            f"{origin}: use_scaled_rope is {scaled}, but the scaling in puna.json is "
            f"{full.rope_scaling.rope_type!r}; remove puna.json if it is of another model"
        )
    if full.tie_word_embeddings and not config.tie_word_embeddings:
        raise ModelError(f"{origin}: the embedding is tied by puna.json, but output.weight differs from it")
    return config.model_copy(update={name: getattr(full, name) for name in (*_UNSAID, *_UNUSED)})


def _same_shape(config: ModelConfig, preset: ModelConfig) -> bool:
    # Not the vocabulary, to which a fine-tuned model may have added.
    return all(getattr(config, name) == getattr(preset, name) for name in _SHAPE)


def _integer(values: dict[str, Any], name: str, default: int, origin: str) -> int:
    value = _given(values, name, default)
    if type(value) is not int or not 0 < value < _LARGEST:
        raise ModelError(f"{origin}: {name} is {_cut(value)}; expected a positive integer")
    return value


def _given(values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    return default if value is None else value


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

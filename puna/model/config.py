"""The shape of a Llama, under the names that Hugging Face's `config.json` uses."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from puna.errors import nearest
from puna.model.rope import SCALINGS, DynamicScaling, NoScaling, RopeScaling
from puna.settings import Settings, parse


class ModelConfig(Settings):
    """Everything that determines the computation; weights apart.

    `num_key_value_heads` and `head_dim` may be left out (or None) and are always integers afterwards: as many
    as query heads, and hidden_size / num_attention_heads. With a `sliding_window` (arXiv 2310.06825) a token
    at position t attends to the positions above t - sliding_window, up to its own.

    Raises:
        SettingsError: in one line, every fault found.

    >>> ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5,
    ...             num_attention_heads=8, num_key_value_heads=4).head_dim
    8
    """

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(None, gt=0)  # type: ignore[assignment]  # filled in below
    head_dim: int = Field(None, gt=0)  # type: ignore[assignment]  # filled in below
    max_position_embeddings: int = Field(2048, gt=0, lt=2**40)
    rms_norm_eps: float = Field(1e-5, gt=0, allow_inf_nan=False)
    rope_theta: float = Field(
        10_000.0, gt=1, lt=1e15, allow_inf_nan=False
    )  # far beyond any real one; its powers stay finite
    rope_scaling: RopeScaling = NoScaling()
    tie_word_embeddings: bool = False
    sliding_window: int | None = Field(None, gt=0)
    attention_bias: bool = False
    mlp_bias: bool = False
    residual_dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError:
            parse(type(self), values, type(self).__name__)  # says the same in one line
            raise

    # Pydantic's mark for an __init__ that only validates. With it a config nested in other settings is built
    # without this call, and its faults keep their dotted names there.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    # `info.data` lacks a field that was itself at fault; that is told already, so any valid value will do.

    @field_validator("num_key_value_heads", mode="before")
    @classmethod
    def _as_many_as_query_heads(cls, value: Any, info: ValidationInfo) -> Any:
        return info.data.get("num_attention_heads", 1) if value is None else value

    @field_validator("head_dim", mode="before")
    @classmethod
    def _share_of_hidden_size(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        if not {"hidden_size", "num_attention_heads"} <= info.data.keys():
            return 2
        hidden, heads = info.data["hidden_size"], info.data["num_attention_heads"]
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not divisible by num_attention_heads {heads}; "
                "change one of them, or set head_dim"
            )
        return hidden // heads

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _known_scaling(cls, value: Any) -> Any:
        known = f"one of {', '.join(SCALINGS)}"
        if not isinstance(value, dict):
            return value
        if "rope_type" not in value:
            raise ValueError(f"rope_type is required: {known}")
        if not isinstance(value["rope_type"], str) or value["rope_type"] not in SCALINGS:
            name = f"{value['rope_type']!s:.40}"
            raise ValueError(f"rope_type must be {known}, got {name!r}.{nearest(name, SCALINGS)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}; every key/value head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                "head_dim must be even, since rotary embedding turns pairs of dimensions, got "
                f"{self.head_dim}; change num_attention_heads or set head_dim"
            )
        if isinstance(self.rope_scaling, DynamicScaling) and self.head_dim == 2:
            raise ValueError("rope_scaling dynamic needs a head_dim above 2: its exponent is H / (H - 2)")
        return self

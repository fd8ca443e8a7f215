"""What one request asks of sampling, and where its answer ends; what is reported of a token. No tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from puna.settings import Settings, parse

LONGEST = 100_000  # characters of all stop strings
STOPS = 256  # texts: each is looked for after every token
BIAS = 10_000.0  # far beyond any logit, and still exact enough in float32 not to swallow one
CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")


class SamplingParams(Settings):
    """How one request wants its tokens chosen, and when to stop.

    The defaults draw from the model's own distribution. `temperature` 0 always takes the likeliest token, the
    lowest id where several are; of the other rules only those before temperature in `ORDER` then have a say,
    since they alone change which token is likeliest.

    Raises:
        SettingsError: in one line, every fault found.
    """

    max_new_tokens: int = Field(256, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    """Until the answer has this many tokens nothing but a finished constraint ends it."""
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens, as few as together reach this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this share of the likeliest one's probability."""
    typical_p: float = Field(1.0, gt=0, le=1)
    """Keep tokens whose surprise is nearest to the expected, as few as together reach this probability."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Above 1, tokens that have occurred in the prompt or the answer become rarer."""
    presence_penalty: float = Field(0.0, ge=-100, le=100)
    """Taken from the logit of every token that has occurred in the answer."""
    frequency_penalty: float = Field(0.0, ge=-100, le=100)
    """Taken from a token's logit once for each time it has occurred in the answer."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids; ids may be written as text, as JSON does."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """The same seed gives the same answer, whatever else is in the batch; None differs every time."""
    n: int = Field(1, ge=1, le=1024)
    """How many answers; each draws random numbers of its own, the first the same ones for every n."""
    best_of: int | None = Field(None, ge=1, le=1024)
    """Make this many answers and give the n whose tokens have the highest mean log-probability."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; the answer is cut before the first of them. One may be given bare."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end an answer, beside the model's own end tokens. One may be given bare."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logprobs: int | None = Field(None, ge=0)
    """How many likely tokens to report beside each chosen one; 0: the chosen one alone, None: nothing."""
    prompt_logprobs: int | None = Field(None, ge=0)
    """The same for the prompt's tokens, each given those before it."""
    json_schema: dict[str, Any] | bool | None = None
    """The answer is JSON that this schema admits; True: any object. A text holding a schema will do too."""
    regex: str | None = Field(None, min_length=1)
    """The whole answer matches this regular expression."""
    grammar: str | None = Field(None, min_length=1)
    """The whole answer is a sentence of this grammar, in llguidance's Lark notation."""
    choice: tuple[str, ...] = ()
    """The whole answer is one of these texts. One may be given bare."""
    overflow: Literal["refuse", "truncate", "slide"] = "refuse"
    """Where the context is too short: refuse the prompt and end the answer; drop the oldest prompt tokens;
    or let the context slide along the answer."""
    priority: int = Field(0, ge=-1000, le=1000)
    """Larger goes first where requests compete; none waits for ever."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError:
            parse(type(self), values, "sampling")  # says the same in one line
            raise

    # Pydantic's mark for an __init__ that only validates: nested in other settings, faults keep their names.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @property
    def answers(self) -> int:
        """How many are made, of which the best n are given."""
        return self.best_of or self.n

    @property
    def constrained(self) -> bool:
        """Whether a schema, an expression, a grammar or a choice binds the answer."""
        return bool(self._constraints())

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_texts(cls, value: Any) -> Any:
        texts = _texts((value,) if isinstance(value, str) else value)
        if len(texts) > STOPS or sum(map(len, texts)) > LONGEST:
            raise ValueError(f"expected at most {STOPS} texts of {LONGEST:,} characters together")
        return texts

    @field_validator("choice", mode="before")
    @classmethod
    def _choice_texts(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("expected at least one text to choose, got []; leave it out to choose freely")
        return () if value is None else _texts((value,) if isinstance(value, str) else value)

    @field_serializer("choice", when_used="json")
    def _choice_or_none(self, value: tuple[str, ...]) -> list[str] | None:
        """Read back as it was: an empty list would be refused."""
        return list(value) or None

    @field_validator("stop_ids", mode="before")
    @classmethod
    def _stop_tokens(cls, value: Any) -> Any:
        values = [value] if _is_id(value) else value
        if not isinstance(values, list | tuple) or not all(map(_is_id, values)):
            raise ValueError(f"expected a token id or a list of them, each an integer ≥ 0, got {value!r}")
        return tuple(values)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _by_id(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"expected a table of token ids and what to add to their logits, got {value!r}")
        return {_as_id(key): _bias(key, bias) for key, bias in value.items()}

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema(cls, value: Any) -> Any:
        schema = value
        if isinstance(value, str):
            try:
                schema = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"expected a schema as JSON, got text that is none: {error}") from None
        if schema is not None and schema is not True and not isinstance(schema, dict):
            raise ValueError(f"expected a JSON schema, or true for any object, got {value!r}")
        return schema

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}; "
                "lower the one or raise the other"
            )
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(
                f"best_of {self.best_of} is below n {self.n}; the n best are taken of best_of answers, "
                "so raise best_of or lower n"
            )
        self._agree_on_constraint()
        return self

    def _agree_on_constraint(self) -> None:
        given = self._constraints()
        if len(given) > 1:
            raise ValueError(f"expected at most one constraint, got {' and '.join(given)}; leave one")
        against = [name for name in ("stop", "stop_ids", "ignore_eos") if getattr(self, name)]
        if given and against:
            raise ValueError(
                f"{given[0]} and {against[0]} contradict each other: a constrained answer ends where it is "
                f"complete, and cut elsewhere it would not be valid; leave {against[0]} out"
            )

    def _constraints(self) -> list[str]:
        return [name for name in CONSTRAINTS if getattr(self, name) not in (None, ())]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before any rule: of a token and the likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(text, str) and text for text in values):
        raise ValueError(f"expected a list of texts, none of them empty, got {values!r}")
    return tuple(values)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _as_id(key: Any) -> int:
    token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12 else key
    if not _is_id(token):
        raise ValueError(f"expected token ids, integers ≥ 0, as keys, got {key!r}")
    return token


def _bias(key: Any, bias: Any) -> float:
    number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not number or not -BIAS <= bias <= BIAS:  # NaN fails too
        raise ValueError(f"expected a number from {-BIAS:g} to {BIAS:g} for token {key}, got {bias!r}")
    return float(bias)

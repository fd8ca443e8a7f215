"""The shapes of responses, for the API's description: what responses.py and chunks.py write."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length", "tool_calls"]


class Shape(BaseModel):
    """A JSON object of just these fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class ErrorDetail(Shape):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class Error(Shape):
    """The body of every response that is no success."""

    error: ErrorDetail


class Usage(Shape):
    """Tokens of the prompts as used, and all that were produced."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LikelyToken(Shape):
    """A token, its natural log-probability, and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(LikelyToken):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatTokens(Shape):
    """Log-probabilities of an answer in a conversation."""

    content: list[ChosenToken]
    refusal: None


class CalledFunction(Shape):
    """Which function is called, and its arguments as JSON."""

    name: str
    arguments: str


class MadeCall(Shape):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Shape):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MadeCall] = []


class ChatChoice(Shape):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatTokens | None
    finish_reason: Finish


class ChatCompletion(Shape):
    """Answers in a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextTokens(Shape):
    """Log-probabilities of a completion; with echo the prompt's too."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Shape):
    """One completion."""

    index: int
    text: str
    logprobs: TextTokens | None
    finish_reason: Finish


class Completions(Shape):
    """Completions of prompts: all of the first prompt come first."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelEntry(Shape):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int
    """Tokens of prompt and answer together, at most."""
    max_model_len: int
    """The same."""
    template: str | None
    """What conversations are written by: a name, `model` for its own, `custom`; null: it takes none."""


class ModelList(Shape):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelEntry]


class Piece(Shape):
    """An id and its text, or its bytes where they are no text."""

    id: int
    piece: str | list[int]


class Tokens(Shape):
    """What a text becomes."""

    tokens: list[int] | list[Piece]


class Detokenized(Shape):
    """What ids become."""

    content: str


class AppliedTemplate(Shape):
    """The prompt that a conversation becomes."""

    prompt: str
    tokens: list[int]
    template: str


class Health(Shape):
    """That all is well."""

    status: Literal["ok"]


class Status(BaseModel):
    """What the live view shows."""

    model_config = ConfigDict(extra="allow")


SHAPES: tuple[type[Any], ...] = (
    *(Error, ChatCompletion, Completions, ModelList, ModelEntry),
    *(Tokens, Detokenized, AppliedTemplate, Health, Status),
)

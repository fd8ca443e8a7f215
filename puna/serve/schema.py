"""The shapes of requests: OpenAI's fields, what is held against each, and the few that are Puna's own.

Null is as good as leaving a field out. A field whose type admits nothing but what changes nothing, such as
null or an empty text, is one of OpenAI's that is not supported; see UNSUPPORTED. OTHER_NAMES and NOT_HERE are
fields of other servers, for messages.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

# What would change the answer and is not supported: refused by name, unless it asks for no change.
UNSUPPORTED = frozenset(
    {
        *("audio", "function_call", "functions", "modalities", "moderation", "prediction"),
        *("prompt_cache_options", "reasoning_effort", "suffix", "verbosity", "web_search_options"),
    }
)
OTHER_NAMES = {
    **dict.fromkeys(("n_predict", "max_new_tokens", "max_completion_tokens"), "max_tokens"),
    **dict.fromkeys(("guided_json", "json_schema"), "response_format"),
    "top_logprobs": "logprobs",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "stop_token_ids": "stop_ids",
    "min_tokens": "min_new_tokens",
    "repeat_penalty": "repetition_penalty",
}
NOT_HERE = frozenset(
    {"cache_prompt", "chat_template_kwargs", "add_generation_prompt", "truncate_prompt_tokens"}
)
MOST_PROMPTS = 2048
MOST_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
FIRST = Field(fail_fast=True)  # a list of a million wrong items is one fault
Ids = Annotated[list[TokenId], Field(min_length=1), FIRST]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Bias = dict[
    Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]
]


_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


class Contradiction(ValueError):
    """A field does not go with another; `param` is the one to blame."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Body(BaseModel):
    """A JSON object: no coercion, unknown fields refused, numbers finite."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class PlainText(Body):
    """Any text."""

    type: Literal["text"]


class JsonObject(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema; without `schema` any object."""

    name: Name
    description: str | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Accepted; the answer always keeps to the schema."""


class JsonBySchema(Body):
    """JSON that a schema admits."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainText | JsonObject | JsonBySchema, Field(discriminator="type")]


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = None
    """Send one more chunk at the end, with the usage and no choices."""
    include_obfuscation: bool | None = None
    """Accepted; nothing is padded."""


class Asked(Body):
    """What both kinds of completion take."""

    model: str | None = None
    """The name that /v1/models gives, or none."""
    stream: bool | None = None
    """Send the answer in server-sent events as it is made."""
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    """How many answers to each prompt; 1 unless given."""
    temperature: float | None = Field(None, ge=0, le=2)
    """1 unless given; 0 always takes the likeliest token."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Draw from the likeliest tokens that reach this probability together; 1 unless given."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken from the logit of every token that has occurred in the answer."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken from a token's logit once for each time it has occurred in the answer."""
    logit_bias: Bias | None = None
    """Added to the logits of these token ids."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same answer, whoever else is being answered. One below 0 stands for itself plus
    2⁶³."""
    stop: Text | Annotated[list[Text], Field(max_length=256), FIRST] | None = None
    """Texts that end the answer, which is cut before the first of them."""
    response_format: ResponseFormat | None = None
    """What the answer is held to. Beside tools that the answer may call it is a call, or of this form."""

    top_k: int | None = Field(None, ge=-1)
    """Puna's own: draw from the k likeliest tokens; 0 or -1: from all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Puna's own: leave out tokens below this share of the likeliest one's probability."""
    typical_p: float | None = Field(None, gt=0, le=1)
    """Puna's own: draw from the tokens of typical surprise that reach this probability together."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    """Puna's own: above 1, tokens that have occurred in prompt or answer become rarer."""
    min_new_tokens: int | None = Field(None, ge=0)
    """Puna's own: nothing but a finished constraint ends the answer before it has so many."""
    ignore_eos: bool | None = None
    """Puna's own: go on past the model's end tokens."""
    stop_ids: Annotated[list[TokenId], Field(max_length=256), FIRST] | None = None
    """Puna's own: token ids that end the answer too."""
    regex: str | None = Field(None, min_length=1)
    """Puna's own: the whole answer matches this regular expression."""
    grammar: str | None = Field(None, min_length=1)
    """Puna's own: the whole answer is a sentence of this grammar, in llguidance's Lark notation."""
    choice: Annotated[list[Text], Field(min_length=1), FIRST] | None = None
    """Puna's own: the whole answer is one of these texts."""
    overflow: Literal["refuse", "truncate", "slide"] | None = None
    """Puna's own: where the context is too short, refuse the prompt (unless given), drop its oldest tokens,
    or let the context slide along the answer."""

    user: str | None = None
    """Accepted, as are the next ones; they cannot change the answer."""
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Contradiction(
                "stream_options",
                "stream_options goes with stream: true; give that, or leave stream_options out",
            )
        if self.grammar is not None and _GBNF.search(self.grammar):
            raise Contradiction(
                "grammar",
                'grammar: expected llguidance\'s Lark notation, got GBNF ("::="); write rules as: start: "a"',
            )
        return self


class CompletionRequest(Asked):
    """Continue prompts."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS), FIRST]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS), FIRST]
    )
    """Text or token ids, or a list of prompts. Special tokens spelled in a text are just text."""
    max_tokens: int | None = Field(None, ge=0)
    """The longest answer, cut to what the context has left; else 16. 0, with echo, scores the prompt."""
    best_of: int | None = Field(None, ge=1, le=128)
    """Make so many answers and give the n of the highest mean log-probability."""
    echo: bool | None = None
    """Give the prompt back before the answer."""
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    """Log-probabilities of the tokens, and of so many likely ones beside each."""
    suffix: Literal[""] | None = None
    """Not supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise Contradiction(
                "max_tokens",
                "max_tokens 0 asks for nothing; give 1 or more, or echo: true to score the prompt",
            )
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise Contradiction(
                "best_of", f"best_of {self.best_of} is below n {self.n or 1}; raise best_of, or lower n"
            )
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise Contradiction(
                "best_of",
                "best_of is only known at the end, so it cannot stream; leave out best_of or stream",
            )
        return self


class TextPart(Body):
    """A piece of a message; the pieces are joined with nothing between them."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], FIRST]


class SystemMessage(Body):
    """What the assistant is told beforehand; `developer` is another name of `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(Body):
    """Which function, and its arguments as JSON."""

    name: str
    arguments: str
    parsed_arguments: Any = None
    """Accepted: OpenAI's client adds it to what it streamed; so `index` and `parsed` below."""


class ToolCall(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class AssistantMessage(Body):
    """What the assistant said; it may be given back just as it came."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    parsed: Any = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content, or tool_calls")
        return self


class ToolMessage(Body):
    """What a tool gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Body):
    """A function that the model may call, its parameters as a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A function's name."""

    name: Name


class NamedTool(Body):
    """The tool to call."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Asked):
    """Answer a conversation."""

    messages: Annotated[list[Message], Field(min_length=1), FIRST]
    max_tokens: int | None = Field(None, ge=1)
    """The longest answer, cut to what the context has left, which is meant too where it is not given."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Log-probabilities of the tokens."""
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    """And of so many likely ones beside each."""
    tools: Annotated[list[Tool], FIRST] | None = None
    """Functions that the answer may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Whether it must, or which."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several at once."""

    audio: None = None
    """Not supported, as the next ones."""
    functions: None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1), FIRST] | None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Contradiction(
                "max_completion_tokens",
                "max_completion_tokens is the newer name of max_tokens; give one of them",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Contradiction(
                "top_logprobs",
                "top_logprobs goes with logprobs: true; give that, or leave top_logprobs out",
            )
        return self


class TokenizeRequest(Body):
    """Which ids a text becomes."""

    content: str
    add_special: bool | None = None
    """Put BOS before it, as a prompt has it."""
    parse_special: bool | None = None
    """Take special tokens spelled in the text for such."""
    with_pieces: bool | None = None
    """Give each id's text too."""


class DetokenizeRequest(Body):
    """Which text ids become."""

    tokens: Annotated[list[TokenId], FIRST]

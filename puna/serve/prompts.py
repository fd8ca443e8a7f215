"""A request → the ids it becomes: through the model's chat template, the plain one, or as given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from puna.engine.answer import Request
from puna.engine.params import SamplingParams
from puna.errors import InputError, PunaError
from puna.serve.bodies import parse_body
from puna.serve.faults import BadRequest
from puna.serve.sampling import (
    CONSTRAINTS,
    chat_params,
    check_entries,
    completion_params,
    room_after,
    stops_of,
)
from puna.serve.schema import Asked, ChatRequest, CompletionRequest
from puna.serve.state import ServerState
from puna.serve.tools import Binding, bind, conversation
from puna.tokenizer import chat
from puna.tokenizer.tokenizer import Tokenizer

PLAIN = "plain"
PLAIN_STOP = ("\nUser:",)  # a model that was never taught to stop goes on with what the user says next
PLAIN_NOTE = "this model has no chat template; the conversation was written in the plain format"
OWN = "model"
SLACK = 4  # for tokenizers that drop some of a text, such as repeated spaces
OF_IDS = ("stop_ids", "logit_bias", "stop")  # fields that the model may not be able to follow
UNBOUND = Binding({})


@dataclass(frozen=True)
class Task:
    """A request for completions, ready for the engine: nothing of it takes long any more."""

    asked: Asked
    requests: list[Request]
    """One for each prompt."""
    echoes: list[str | None]
    """What each prompt's text was; None where it was ids."""
    binding: Binding = UNBOUND
    """What holds the answer."""
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def said(self) -> Any:
        """What was asked, for the log."""
        if isinstance(self.asked, ChatRequest):
            return _messages(self.asked)
        return [echo or list(r.prompt) for echo, r in zip(self.echoes, self.requests, strict=True)]


@dataclass(frozen=True)
class Conversation:
    """A conversation as a template takes it."""

    tokenizer: Tokenizer
    template: str | None
    messages: list[dict[str, Any]]
    variables: Mapping[str, Any]

    def ids(self) -> list[int]:
        """What the model reads."""
        return chat.render(self.tokenizer, self.messages, self.template, variables=self.variables)

    def text(self) -> str:
        """The same for people."""
        return chat.render_text(self.tokenizer, self.messages, self.template, variables=self.variables)


def completion_task(state: ServerState, raw: bytes) -> Task:
    """The body of a request for completions, made ready.

    Raises:
        BadRequest, InputError: it is at fault.
    """
    asked, values = parse_body(CompletionRequest, raw)
    check_model(state, asked.model)
    binding = _held(asked, bind(response_format=values.get("response_format")))
    params = completion_params(asked, binding)
    prompts = _prompts(asked.prompt)
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_size(state, asked, len(prompt), "prompt")
    requests = [_request(state, _ids(state, prompt), params, "prompt") for prompt in prompts]
    check_entries(asked, requests, state.llm.context)
    echoes = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    return Task(asked, requests, echoes, binding)


def chat_task(state: ServerState, raw: bytes) -> Task:
    """The body of a request for a chat completion, made ready.

    Raises:
        BadRequest, InputError: it is at fault.
    """
    asked, binding, talk = _conversation(state, raw)
    plain = talk.template == PLAIN
    ids = talk.ids()
    room = room_after(len(ids), state.llm.context, state.worker.load.blocks)
    params = chat_params(asked, binding, room, PLAIN_STOP if plain else ())
    note = ((b"x-puna-note", PLAIN_NOTE.encode()),) if plain else ()
    requests = [_request(state, ids, params, "messages")]
    check_entries(asked, requests, state.llm.context)
    return Task(asked, requests, [None], binding, note)


def applied(state: ServerState, raw: bytes) -> dict[str, Any]:
    """The prompt that the body of a request for a chat completion becomes: text, ids, and by which template.

    Raises:
        BadRequest, InputError: it is at fault.
    """
    _, _, talk = _conversation(state, raw)
    return {"prompt": talk.text(), "tokens": talk.ids(), "template": template_name(state)}


def template_name(state: ServerState) -> str | None:
    """What conversations are written by: a name of TEMPLATES, "model" for its own, "custom" for another."""
    if state.llm.tokenizer is None:
        return None
    template = _template(state, state.llm.tokenizer)
    return OWN if template is None else template if template in chat.TEMPLATES else "custom"


def check_model(state: ServerState, name: str | None) -> None:
    """Whether a request means the model that is served.

    Raises:
        BadRequest: it names another, 404.
    """
    if name is not None and name not in state.names:
        raise BadRequest(
            f"the model {name!r:.100} is not served here; the one that is: {state.model_id!r}",
            "model",
            "model_not_found",
            404,
        )


def _conversation(state: ServerState, raw: bytes) -> tuple[ChatRequest, Binding, Conversation]:
    asked, values = parse_body(ChatRequest, raw)
    check_model(state, asked.model)
    tokenizer = state.llm.tokenizer
    if tokenizer is None:
        raise BadRequest(
            "this model has no tokenizer, so it takes no conversation; ask /v1/completions with token ids",
            "messages",
        )
    template = _template(state, tokenizer)
    ends = (*stops_of(asked), *(PLAIN_STOP if template == PLAIN else ()))
    binding = bind(values.get("tools"), values.get("tool_choice"), values.get("response_format"), ends)
    given = _messages(asked)
    _check_size(state, asked, sum(1 + len(message.get("content") or "") for message in given), "messages")
    try:
        messages, variables = conversation(tokenizer, template, given, binding.tools)
        return asked, _held(asked, binding), Conversation(tokenizer, template, messages, variables)
    except PunaError as error:
        raise BadRequest(str(error), "messages") from None


def _check_size(state: ServerState, asked: Asked, characters: int, param: str) -> None:
    """Refuse what cannot fit before it is cut into tokens, which of megabytes takes seconds."""
    most = SLACK * state.longest_token * state.llm.context
    if characters > most > 0 and asked.overflow in (None, "refuse"):
        raise BadRequest(
            f"{param}: {characters:,} characters are more than a context of {state.llm.context:,} tokens "
            'holds; shorten it, or give overflow "truncate" or "slide"',
            param,
            "context_length_exceeded",
        )


def _held(asked: Asked, binding: Binding) -> Binding:
    """What holds an answer, where none of OpenAI's fields does so perhaps one of Puna's own."""
    own = next((name for name in CONSTRAINTS if getattr(asked, name)), None)
    return replace(binding, param=own) if binding.param is None else binding


def _ids(state: ServerState, prompt: str | list[int]) -> list[int]:
    try:
        return state.llm.ids(prompt)
    except InputError as error:
        raise BadRequest(str(error), "prompt") from None


def _request(state: ServerState, ids: list[int], params: SamplingParams, param: str) -> Request:
    """`param` is the field that became the ids."""
    if len(ids) >= state.llm.context > 1 and params.overflow == "refuse":
        raise BadRequest(
            f"the prompt has {len(ids)} tokens; this model takes {state.llm.context}, the answer included; "
            'shorten it, or give overflow "truncate" or "slide"',
            param,
            "context_length_exceeded",
        )
    try:
        return state.llm.request(ids, params, continues=param == "prompt")
    except InputError as error:
        named = next((name for name in OF_IDS if str(error).startswith(name)), param)
        raise BadRequest(str(error), named) from None


def _template(state: ServerState, tokenizer: Tokenizer) -> str | None:
    return state.settings.template or (PLAIN if tokenizer.chat_template is None else None)


def _messages(asked: ChatRequest) -> list[dict[str, Any]]:
    """In OpenAI's form, with contents as texts and what was left out left out."""
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    for message in messages:
        if message["role"] == "developer":
            message["role"] = "system"
        if isinstance(content := message.get("content"), list):
            message["content"] = "".join(part["text"] for part in content)
        message.pop("annotations", None)
    return messages


def _prompts(prompt: Any) -> list[str | list[int]]:
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

"""Functions that a model may call: what binds an answer to a call, and the calls of a conversation's history.

A call is written as Llama 3.1 does, {"name": …, "parameters": …}, compactly. An answer that begins with "{"
is one, and any other is free text; so a reader (see `calls`) knows from the first visible character, and
whatever is called is among the functions and given arguments that its schema admits. Beside a response_format
an answer that is no call is JSON too: it is one where the first member is "name", that of a function, and the
second "parameters", which no other answer may be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.engine import patterns
from puna.engine.constraints import beginning
from puna.engine.notation import json_rule
from puna.engine.params import SamplingParams
from puna.errors import InputError, TokenizerError, nearest
from puna.serve.faults import BadRequest
from puna.tokenizer import chat
from puna.tokenizer.tokenizer import Tokenizer

MOST = 128  # functions, as at OpenAI
# How errors begin that are about what binds an answer, and where in a grammar they say that the fault is.
_FORMS = (
    *("the grammar", "grammar has", "the JSON schema", "json_schema has", "a constraint has"),
    *("the regular expression", "not a regular expression", "regex has", "half of a surrogate pair"),
    *("the choice", "choice has", "constraints need", "nothing that this model's vocabulary"),
)
_PLACE = re.compile(r"the grammar cannot be used: at ([0-9]+)\([0-9]+\): ")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# What is around the name and the parameters, as constraints write JSON: in JSON's own words, each by itself,
# or the longest that an answer may go on with would be taken for the only one.
_CALL = r"""
call: "{" "\"name\"" ":" (ALTERNATIVES) "}"
with: "," "\"parameters\"" ":"
"""
_REQUIRED = "start: call"
_FORM = "form: "
# Some tokenizers begin whatever follows a colon with a space.
_AUTO = r"""
start: BLANK? call | TEXT | BLANK | ""
BLANK: /[ \n]{1,2}/
TEXT: /\s*[^\s{](?s:.)*/WITHOUT
"""
_WITHOUT = " & ~/(?s:.*){}(?s:.+)/"  # nothing follows it
_FORMED = r"""
start: BLANK? call | form
BLANK: /[ \n]{1,2}/
"""
# Any object; but members come in the order of their schema, so "parameters" never follow the name.
_ANY_BUT_CALLS: dict[str, Any] = {"type": "object", "properties": {"parameters": True, "name": True}}


@dataclass(frozen=True)
class Binding:
    """What a request's `tools`, `tool_choice` and `response_format` make of its answer."""

    fields: Mapping[str, Any]
    """Of SamplingParams: json_schema or grammar; empty where none of the three binds the answer."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the model is told of, in OpenAI's form; empty where nothing is to be called."""
    param: str | None = None
    """The field of the request that binds, for messages: one of these, or one of Puna's own."""
    ends: tuple[str, ...] = ()
    """Texts of which an answer may write one at its end: it is no part of what it says."""
    formed: bool = False
    """Whether an answer that is no call is JSON."""

    @property
    def calls(self) -> bool:
        """Whether an answer may be a call: then a ToolCallReader reads it."""
        return bool(self.tools)

    @property
    def names(self) -> list[str]:
        """Of the functions that the model is told of."""
        return [tool["function"]["name"] for tool in self.tools]

    def blamed(self, error: InputError) -> InputError:
        """What the engine says of an answer's form, said of the request's field; other errors as they are."""
        text = str(error)
        if self.param is None or not text.startswith(_FORMS):
            return error
        place = _PLACE.match(text)
        if place is None or "grammar" not in self.fields:
            return BadRequest(f"{self.param}: {text}", self.param)
        line = self.fields["grammar"].splitlines()[int(place[1]) - 1]
        if line.startswith(_FORM):
            return BadRequest(
                f"response_format: the JSON schema cannot be used: {text[place.end() :]}", "response_format"
            )
        name = line.partition(r'\"" with')[0].rpartition('"')[2]
        return BadRequest(
            f"tools: the parameters of {name!r} cannot be used: {text[place.end() :]}", self.param
        )


def bind(
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    response_format: Mapping[str, Any] | None = None,
    ends: Sequence[str] = (),
) -> Binding:
    """What a request asks for, its fields in the shapes of `schema`, as plain values.

    `ends` are texts that end an answer in words, as stop strings do, which nothing that is bound may have.

    Raises:
        BadRequest: they contradict each other, or the schema of a function is of no use.
    """
    formed, functions = _formed(response_format), _functions(tools or ())
    choice = tool_choice or "auto"
    if choice == "none" or (choice == "auto" and not functions):
        return formed
    wanted = functions if isinstance(choice, str) else _named(functions, choice["function"]["name"])
    if not wanted:
        raise BadRequest(
            f"tool_choice {choice!r} needs tools to choose from, and there are none; give some", "tool_choice"
        )
    told = tuple(_told(function) for function in functions.values())
    if not formed.fields:
        rules = (_auto(ends) if choice == "auto" else _REQUIRED) + _call(wanted)
        return Binding({"grammar": rules}, told, "tools", tuple(ends))
    if choice != "auto":
        raise BadRequest(
            "response_format and tool_choice contradict each other: an answer that must be a call has no "
            'other form; leave one out, or give tool_choice "auto" or "none"',
            "response_format",
        )
    form = _form(formed.fields["json_schema"], wanted)
    return Binding({"grammar": f"{_FORMED}{form}{_call(wanted)}"}, told, "tools", formed=True)


def _formed(response_format: Mapping[str, Any] | None) -> Binding:
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return Binding({})
    schema = (response_format.get("json_schema") or {}).get("schema")
    return Binding({"json_schema": True if schema is None else schema}, param="response_format")


def _form(schema: Any, functions: Iterable[str]) -> str:
    """The rule of an answer that is no call, by a schema which admits nothing that reads as one."""
    wanted = _ANY_BUT_CALLS if schema is True else schema
    try:
        rule = json_rule(wanted)
        heads = [f'{{"name":"{name}","parameters":' for name in functions]
        head = beginning(SamplingParams(json_schema=wanted), heads)
    except InputError as error:
        raise BadRequest(f"response_format: {error}", "response_format") from None
    if head is not None:
        raise BadRequest(
            f"response_format: an answer by this schema may begin with {head}, as a call of that function "
            'does; rename a member, or forbid others by "additionalProperties": false',
            "response_format",
        )
    return f"{_FORM}{rule}"


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By name."""
    if len(tools) > MOST:
        raise BadRequest(
            f"tools: expected at most {MOST} functions, got {len(tools)}; leave some out", "tools"
        )
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool["function"]
        name = function["name"]
        if not _NAME.fullmatch(name):
            raise BadRequest(
                f"tools: expected names of 1 to 64 of a-z A-Z 0-9 _ -, got {name!r:.100}", "tools"
            )
        if name in functions:
            raise BadRequest(f"tools: two functions are named {name!r}; rename one", "tools")
        functions[name] = function
    return functions


def _named(functions: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Mapping[str, Any]]:
    if name not in functions:
        known = ", ".join(map(repr, functions)) or "none"
        raise BadRequest(
            f"tool_choice: no function {name!r} among the tools, which are: {known}."
            + nearest(name, functions),
            "tool_choice",
        )
    return {name: functions[name]}


def _told(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool without what says nothing to a model."""
    told = {"name": function["name"], "description": function.get("description")}
    parameters = function.get("parameters")
    told["parameters"] = NO_ARGUMENTS if parameters is None else parameters
    return {
        "type": "function",
        "function": {key: value for key, value in told.items() if value is not None},
    }


def _auto(ends: Sequence[str]) -> str:
    return _AUTO.replace("WITHOUT", "".join(_WITHOUT.format(patterns.literal(end)) for end in ends))


def _call(functions: Mapping[str, Mapping[str, Any]]) -> str:
    """The rules of a grammar by which one of these is called, each in a line: errors tell the line."""
    rules = [
        rf'f{number}: "\"{name}\"" with {_parameters(name, function.get("parameters"))}'
        for number, (name, function) in enumerate(functions.items())
    ]
    alternatives = "|".join(f"f{number}" for number in range(len(rules)))
    return _CALL.replace("ALTERNATIVES", alternatives) + "\n".join(rules)


def _parameters(name: str, schema: Mapping[str, Any] | None) -> str:
    wanted = NO_ARGUMENTS if schema is None else schema
    kind = wanted.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise BadRequest(
            f"tools: the parameters of {name!r} must be of type 'object', got {kind!r:.100}", "tools"
        )
    try:
        return json_rule({**wanted, "type": "object"})
    except InputError as error:
        raise BadRequest(f"tools: the parameters of {name!r}: {error}", "tools") from None


def conversation(
    tokenizer: Tokenizer,
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A history as a chat template takes it, and the template's variables.

    `messages` are in OpenAI's form, their contents texts; `tools` are those of a Binding. A template that
    does not know of tools gets them in words: what may be called in the system's message, calls in the
    assistant's, and what they gave back in the user's.

    Raises:
        InputError: calls and results do not belong together, or arguments are no JSON object.
    """
    history = tool_messages(messages)
    if not tools and not any("tool_calls" in message for message in history):
        return history, {}
    if sees_tools(tokenizer, template):
        return history, {"tools": list(tools)} if tools else {}
    return _in_words(history, tools), {}


def sees_tools(tokenizer: Tokenizer, template: str | None) -> bool:
    """Whether a chat template writes what it is told of functions."""
    asked = [{"role": "user", "content": "Hello"}]
    probe = {"type": "function", "function": {"name": "probe_of_tools", "description": "", "parameters": {}}}
    try:
        return "probe_of_tools" in chat.render_text(tokenizer, asked, template, variables={"tools": [probe]})
    except TokenizerError:
        return False


def tool_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A history in OpenAI's form as templates take it: one call a message, arguments as objects, no nulls.

    Several calls of one message become so many messages, each followed by its result: models that write one
    call an answer know no other history.

    Raises:
        InputError: a call has no result, a result no call, or arguments are no JSON object.
    """
    history: list[dict[str, Any]] = []
    waiting: dict[str, dict[str, Any]] = {}
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message["role"] == "tool":
            call = _answered(waiting, message, where)
            name = call["tool_calls"][0]["function"]["name"]
            history += [call, {"name": name, **message}]
        elif waiting:
            raise InputError(f"{where}: expected {_results(waiting)}, got one of role {message['role']!r}")
        elif message.get("tool_calls"):
            waiting = _calls(message, where)
        else:
            history.append({"content": "", **{k: v for k, v in message.items() if k != "tool_calls"}})
    if waiting:
        raise InputError(f"messages: expected {_results(waiting)}, got none")
    return history


def _calls(message: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """By their ids, a message for each; what was said besides stays with the first."""
    calls: dict[str, dict[str, Any]] = {}
    content = message.get("content") or ""
    for place, call in enumerate(message["tool_calls"]):
        spot = f"{where}.tool_calls[{place}]"
        if call["id"] in calls:
            raise InputError(f"{spot}: the id {call['id']!r:.100} is another call's too; give each its own")
        called = {"name": call["function"]["name"], "arguments": _arguments(call, spot)}
        one = {"id": call["id"], "type": "function", "function": called}
        calls[call["id"]] = {**message, "content": "" if calls else content, "tool_calls": [one]}
    return calls


def _arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = call["function"]["arguments"]
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(f"{where}.function.arguments: expected an object written as JSON, got {text!r:.100}")
    return arguments


def _answered(waiting: dict[str, dict[str, Any]], message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The call that a result is of; it waits no more."""
    call = waiting.pop(message["tool_call_id"], None)
    if call is None:
        raise InputError(
            f"{where}: tool_call_id {message['tool_call_id']!r:.100} is no call that waits for its "
            "result; results follow the assistant's message with their calls, each once"
        )
    return call


def _results(waiting: Mapping[str, Any]) -> str:
    return f"the result of the call {next(iter(waiting))!r:.100} in a message of role 'tool'"


def _in_words(history: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A history of plain messages; what may be called comes before what the system says."""
    messages = [_message_in_words(message) for message in history]
    if not tools:
        return messages
    words = chat.tools_in_words(tools)
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{words}\n\n{messages[0]['content']}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _message_in_words(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"{message['name']} gave back: {message['content']}"}
    if "tool_calls" in message:
        return {"role": "assistant", "content": chat.calls_in_words(message)}
    return message

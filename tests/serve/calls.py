"""Tools as clients send them, schemas at random, and what becomes of the text that a model writes."""

from __future__ import annotations

import random
from typing import Any

from puna.engine.constraints import Constraint, Grammars
from puna.engine.params import SamplingParams
from puna.serve.calls import ToolCallReader, answer_message
from puna.serve.tools import Binding
from puna.tokenizer.tokenizer import Tokenizer

USER = {"role": "user", "content": "Is it sunny in Lima?"}
CUT = {"overflow": "truncate"}  # the model's context is short


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """As a client sends it."""
    function = {"name": name, **({} if parameters is None else {"parameters": parameters}), **more}
    return {"type": "function", "function": function}


def closed(**properties: Any) -> dict[str, Any]:
    """An object's schema: these members, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


WEATHER = tool(
    "weather", closed(city={"type": "string", "maxLength": 8}), description="What it is like there"
)
CLOCK = tool("clock")


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Any kind, `#/$defs/shared` among them; what it holds is not deep."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kind = rng.choice(kinds + ["object", "array", "anyOf", "ref"] * (depth < 3))
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(0, 6)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-9, 0), "maximum": rng.randint(0, 999)}
    if kind == "enum":
        return {"enum": rng.sample(["red", 'a"b', "é", "\\n", 3, None, True, "x y"], rng.randint(1, 4))}
    if kind == "const":
        return {"const": {"$ref": "#/$defs/none", "n": [1]}}
    if kind == "object":
        return random_object(rng, depth + 1)
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randint(0, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    return {"$ref": "#/$defs/shared"} if kind == "ref" else {"type": kind}


def random_object(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of up to three members, whose names would mislead a reader."""
    names = rng.sample(["a", "b", "city", "name", "parameters", "wärme", "$ref", 'q"', "properties"], 3)
    properties = {name: random_schema(rng, depth) for name in names[: rng.randint(0, 3)]}
    required = [name for name in properties if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": rng.random() < 0.2,
    }


def begin(grammars: Grammars, binding: Binding) -> Constraint:
    """What an answer must keep to from its first token on."""
    constraint = grammars.constraint(SamplingParams(**binding.fields), (), continues=False)
    assert constraint is not None
    return constraint


def takes(grammars: Grammars, tokenizer: Tokenizer, binding: Binding, text: str) -> bool:
    """Whether a text may be the answer, as a whole."""
    constraint = begin(grammars, binding)
    for token in tokenizer.encode(text, bos=False):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.allowed()[tokenizer.eos_id])


def streamed(text: str, reason: str, size: int, *how: Any) -> tuple[dict[str, Any], str | None]:
    """A message put together from deltas, as OpenAI's client does it."""
    reader, deltas = ToolCallReader(*how), []
    for start in range(0, len(text), size):
        deltas += reader.push(text[start : start + size])
    rest, told = reader.finish(reason)
    message: dict[str, Any] = {"content": None}
    for delta in [*deltas, *rest]:
        if "content" in delta:
            message["content"] = (message["content"] or "") + delta["content"]
            continue
        (call,) = delta["tool_calls"]
        assert call.pop("index") == 0
        if "tool_calls" not in message:
            assert call["id"].startswith("call_") and call["function"]["arguments"] == ""
            message["tool_calls"] = [call]
        else:
            assert set(call) == {"function"} and set(call["function"]) == {"arguments"}
            message["tool_calls"][0]["function"]["arguments"] += call["function"]["arguments"]
    return message, told


def same(message: dict[str, Any], other: dict[str, Any]) -> bool:
    """But for the calls' ids, which are drawn."""
    calls = [[call["function"] for call in one.get("tool_calls", ())] for one in (message, other)]
    return (message["content"] or "") == (other["content"] or "") and calls[0] == calls[1]


def assert_read(
    text: str, reason: str, size: int, how: tuple[Any, ...], message: Any, told: str | None
) -> None:
    """An answer read whole, and in pieces of a size, is this text, or a call: its name and its arguments.

    `how` is what the reader is made with; `told` the finish reason that clients see.
    """
    whole, whole_told = answer_message(ToolCallReader(*how), text, reason)
    pieces, pieces_told = streamed(text, reason, size, *how)
    assert same(whole, pieces)
    assert whole_told == pieces_told == told
    if isinstance(message, str):
        assert whole == {"content": message}
        return
    (call,) = whole["tool_calls"]
    assert whole["content"] is None and call["type"] == "function"
    assert (call["function"]["name"], call["function"]["arguments"]) == message

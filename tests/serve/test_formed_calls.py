"""Tools beside a response format: an answer is a call, or of that form; which of them, its beginning says."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from puna.engine.llm import LLM
from puna.errors import InputError
from puna.serve.calls import ToolCallReader, answer_message
from puna.serve.tools import bind
from puna.tokenizer.tokenizer import Tokenizer

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema

from puna.engine.constraints import Grammars
from tests.serve.calls import CLOCK, CUT, USER, WEATHER, assert_read, begin, closed, random_schema, takes
from tests.serve.running import Running, chunks_of

TOOLS = [WEATHER, CLOCK]
PERSON = closed(name={"type": "string", "maxLength": 5}, age={"type": "integer"})
CALL = '{"name":"clock","parameters":{}}'


def form_of(schema: Any) -> dict[str, Any]:
    """A response format of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


ANY = {"type": "json_object"}


@pytest.mark.parametrize(
    ("form", "text", "taken"),
    [
        (ANY, CALL, True),
        (ANY, f"\n{CALL}", True),
        (ANY, '{"name":"clock","parameters":5}', False),
        (ANY, '{"name":"clock","parameter":5}', True),
        (ANY, '{"name":"other","parameters":5}', False),  # any object, but not its members in any order
        (ANY, '{"parameters":5,"name":"clock"}', True),
        (ANY, '{"name":"clock"}', True),
        (ANY, '{"names":["clock"],"a":{"name":"clock","parameters":1}}', True),
        (ANY, "{}", True),
        (ANY, "", False),
        (ANY, "Hello", False),
        (form_of(PERSON), CALL, True),
        (form_of(PERSON), '{"name":"clock","age":3}', True),
        (form_of(PERSON), '{"name":"Ann","age":3}', True),
        (form_of(PERSON), '{"name":"Ann"}', False),
        (form_of({"type": "array"}), '[{"name":"clock"}]', True),
        (form_of({"enum": ["clock", 1]}), '"clock"', True),
    ],
)
def test_what_an_answer_may_be(
    grammars: Grammars, tokenizer: Tokenizer, form: Any, text: str, taken: bool
) -> None:
    assert takes(grammars, tokenizer, bind(TOOLS, "auto", form), text) == taken


def test_whatever_the_form_admits_is_admitted_beside_calls(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rng, seen = random.Random(8), 0
    for _ in range(25):
        schema = {**random_schema(rng), "$defs": {"shared": {"type": "boolean"}}}
        alone, beside = bind(None, None, form_of(schema)), bind(TOOLS, None, form_of(schema))
        left, right = begin(grammars, alone), begin(grammars, beside)
        for _ in range(40):
            if left.complete:
                break
            tokens = [
                t for t, may in enumerate(left.allowed().tolist()) if may and t not in tokenizer.end_ids
            ]
            token = rng.choice(tokens)
            assert right.allowed()[token]
            left.accept(token)
            right.accept(token)
            ends = tokenizer.eos_id
            assert bool(right.allowed()[ends]) == bool(left.allowed()[ends])
        seen += left.complete
    assert seen >= 10


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"enum": [1, {"name": "clock", "parameters": 2}]},
        {"anyOf": [{"type": "array"}, {"$ref": "#/$defs/x"}], "$defs": {"x": closed(name={}, parameters={})}},
    ],
)
def test_a_form_that_reads_as_a_call_is_refused(schema: Any) -> None:
    with pytest.raises(
        InputError, match=r'may begin with \{"name":"(weather|clock)","parameters":, as a call'
    ):
        bind(TOOLS, None, form_of(schema))
    assert bind(TOOLS, "none", form_of(schema)).fields == {"json_schema": schema}


@pytest.mark.parametrize(
    "schema",
    [
        closed(name={"enum": ["other", "clocks"]}, parameters={}),
        closed(parameters={}, name={}),
        closed(a={}, name={}, parameters={}),
        {"type": "object", "properties": {"name": {}}, "additionalProperties": False},
    ],
)
def test_a_form_that_only_looks_like_a_call_is_taken(schema: Any) -> None:
    assert bind(TOOLS, None, form_of(schema)).formed


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "reason", "message", "told"),
    [
        ('{"name":"f","parameters":{"a":1}}', "stop", ("f", '{"a":1}'), "tool_calls"),
        (' {"name":"f","parameters":{', "length", ("f", "{"), "length"),
        ('{"name":"g","parameters":{"a":1}}', "stop", '{"name":"g","parameters":{"a":1}}', "stop"),
        ('{"name":"f","b":1}', "stop", '{"name":"f","b":1}', "stop"),
        ('{"name":"f é"}', "stop", '{"name":"f é"}', "stop"),
        ('{"name":"', "length", '{"name":"', "length"),
        ("[1]", "stop", "[1]", "stop"),
        ("{}", "stop", "{}", "stop"),
    ],
)
def test_reading_either(text: str, reason: str, message: Any, told: str, size: int) -> None:
    assert_read(text, reason, size, ((), ["f"], True), message, told)


def test_json_is_told_once_it_is_no_call() -> None:
    reader = ToolCallReader((), ["f"], True)
    assert reader.push('{"name":"f","') == []
    assert reader.push("x") == [{"content": '{"name":"f","x'}]
    assert reader.push('":1') == [{"content": '":1'}]


def test_a_models_own_answers_are_of_both_kinds(llm: LLM) -> None:
    binding = bind(TOOLS, None, form_of(PERSON))
    kinds = set()
    for seed in range(8):
        answer = llm.generate("x", seed=seed, max_new_tokens=90, **binding.fields)
        reader = ToolCallReader(binding.ends, binding.names, binding.formed)
        message, reason = answer_message(reader, answer.text, answer.finish_reason)
        kinds.add(reason)
        if reason == "stop":
            jsonschema.validate(json.loads(message["content"]), PERSON)
        elif reason == "tool_calls":
            assert message["tool_calls"][0]["function"]["name"] in ("weather", "clock")
    assert {"tool_calls", "stop"} <= kinds


def test_tools_beside_a_form_through_http(server: Running) -> None:
    asked: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "response_format": form_of(PERSON)}
    asked |= {"max_tokens": 90, "n": 8, **CUT}
    choices = server.post("/v1/chat/completions", {**asked, "seed": 3}).json()["choices"]
    assert {choice["finish_reason"] for choice in choices} >= {"stop", "tool_calls"}
    for choice in choices:
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
    streamed: dict[int, list[Any]] = {index: [] for index in range(8)}
    for chunk in chunks_of(server.post("/v1/chat/completions", {**asked, "seed": 3, "stream": True})):
        streamed[chunk["choices"][0]["index"]].append(chunk["choices"][0])
    for choice in choices:
        parts = streamed[choice["index"]]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        content = "".join(part["delta"].get("content") or "" for part in parts)
        assert content == (choice["message"]["content"] or "")
    for more, param in (
        ({"stop": "a"}, "stop"),
        ({"tool_choice": "required"}, "response_format"),
        ({"response_format": form_of({})}, "response_format"),
        ({"response_format": form_of({"type": "wrong"})}, "response_format"),
    ):
        error = server.post("/v1/chat/completions", {**asked, **more}).json()["error"]
        assert error["param"] == param, error

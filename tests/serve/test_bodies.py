"""Bodies that are no request: each gets a line that says where it is wrong, quickly."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from puna.serve.bodies import parse_body
from puna.serve.faults import BadRequest
from puna.serve.schema import NOT_HERE, OTHER_NAMES, Body, ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "hello"}]


def refused(shape: type[Body], body: Any) -> BadRequest:
    """What is said of a body, which may be bytes."""
    with pytest.raises(BadRequest) as caught:
        parse_body(shape, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "an empty one"),
        (b" \n", "an empty one"),
        (b"[]", "got []"),
        (b"null", "got null"),
        (b'"text"', 'got "text"'),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a",}', "not valid JSON"),
        (b'\xff{"prompt": "a"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not valid JSON"),
        (b'{"prompt": NaN}', "NaN is no number"),
        (b'{"prompt": "a", "temperature": Infinity}', "Infinity is no number"),
        (b'{"prompt": "a", "temperature": 1e999}', "too large"),
        (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
        (b'{"prompt": "a", "logit_bias": {"1": 2, "1": 3}}', "'1' is given twice"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "\\udc00": 1}', "surrogate"),
        (b'{"prompt": "' + "\ud800".encode("utf-8", "surrogatepass") + b'"}', "not UTF-8"),
        (b"[" * 100_000, "levels deep"),
        (b'{"prompt":' * 100_000, "levels deep"),
        (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "levels deep"),
        (b'{"prompt":' + b"[" * 500 + b"]" * 500 + b"}", "levels deep"),
    ],
)
def test_what_is_no_json_object(raw: bytes, says: str) -> None:
    assert says in str(refused(CompletionRequest, raw))


def test_whole_characters_are_taken_however_they_are_spelled() -> None:
    asked, _ = parse_body(CompletionRequest, b'{"prompt": "\\ud83d\\ude00"}')
    assert asked.prompt == "😀"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "'prompt' is required"),
        ({"prompt": 5}, "prompt", "expected text, a list of token ids, or a list of either, got 5"),
        ({"prompt": ["a", 1]}, "prompt", "list of either"),
        ({"prompt": []}, "prompt", "list of either"),
        ({"prompt": [[]]}, "prompt", "list of either"),
        ({"prompt": [True]}, "prompt", "list of either"),
        ({"prompt": [1.5]}, "prompt", "list of either"),
        ({"prompt": [-1]}, "prompt", "list of either"),
        ({"prompt": "", "temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"prompt": "", "messages": HELLO}, "messages", "That is a field of /v1/chat/completions"),
        ({"prompt": "", "top_logprobs": 2}, "top_logprobs", "What is meant is 'logprobs' here"),
        ({"prompt": "", "temperature": 2.5}, "temperature", "expected at most 2, got 2.5"),
        ({"prompt": "", "temperature": "1"}, "temperature", 'expected a number, got "1"'),
        ({"prompt": "", "n": 1.5}, "n", "expected an integer"),
        ({"prompt": "", "n": True}, "n", "expected an integer, got true"),
        ({"prompt": "", "stop": ""}, "stop", "expected text that is not empty"),
        ({"prompt": "", "stop": ["a", ""]}, "stop.1", "expected text that is not empty"),
        ({"prompt": "", "suffix": "end"}, "suffix", "'suffix' is not supported here"),
        ({"prompt": "", "logit_bias": {"a": 1}}, "logit_bias.a", 'token ids in digits as keys, got "a"'),
        ({"prompt": "", "logit_bias": {"1": 101}}, "logit_bias.1", "expected at most 100"),
        ({"prompt": "", "max_tokens": 0}, "max_tokens", "max_tokens 0 asks for nothing"),
        ({"prompt": "", "best_of": 1, "n": 2}, "best_of", "best_of 1 is below n 2"),
        ({"prompt": "", "best_of": 2, "stream": True}, "best_of", "cannot stream"),
        ({"prompt": "", "stream_options": {}}, "stream_options", "goes with stream: true"),
        (
            {"prompt": "", "stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "unknown",
        ),
        (
            {"prompt": "", "n": 0, "top_k": -2},
            "n",
            "'n': expected at least 1, got 0; 'top_k': expected at least -1",
        ),
        ({"prompt": "", "seed": 2**63}, "seed", "expected a number below"),
        ({"prompt": "", "grammar": 'root ::= "a"'}, "grammar", "llguidance's Lark notation, got GBNF"),
    ],
)
def test_faults_of_completion_requests(body: Any, param: str | None, says: str) -> None:
    error = refused(CompletionRequest, body)
    assert says in str(error)
    assert error.param == param


UNSUPPORTED = {
    "functions": [],
    "function_call": "auto",
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "moderation": {},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_change_the_answer_and_is_not_supported(name: str) -> None:
    error = refused(ChatRequest, {"messages": HELLO, name: UNSUPPORTED[name]})
    assert name in str(error)
    assert error.param is not None
    assert error.param.startswith(name)


def test_fields_that_ask_for_no_change_are_taken() -> None:
    body: dict[str, Any] = dict.fromkeys(UNSUPPORTED)
    parse_body(ChatRequest, json.dumps({"messages": HELLO, **body}).encode())
    body = {
        "modalities": ["text"],
        "reasoning_effort": "none",
        "verbosity": "medium",
        "function_call": "none",
    }
    parse_body(ChatRequest, json.dumps({"messages": HELLO, **body}).encode())
    parse_body(CompletionRequest, b'{"prompt": "a", "suffix": ""}')
    for shape, needed in ((ChatRequest, {"messages": HELLO}), (CompletionRequest, {"prompt": "a"})):
        nothing = dict.fromkeys(set(shape.model_fields) - set(needed))
        asked, _ = parse_body(shape, json.dumps({**nothing, **needed}).encode())
        assert asked.model_dump(exclude_none=True) == needed


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        (1, "messages.0", "expected an object, got 1"),
        ({}, "messages.0", "expected an object with 'role'"),
        (
            {"role": "wizard"},
            "messages.0",
            "one of 'system', 'developer', 'user', 'assistant', 'tool', got \"wizard\"",
        ),
        ({"content": "a"}, "messages.0", "expected an object with 'role', got one without it"),
        ({"role": "user"}, "messages.0.content", "is required"),
        ({"role": "user", "content": None}, "messages.0.content", "expected text or a list, got null"),
        ({"role": "user", "content": "", "contnt": ""}, "messages.0.contnt", "Did you mean 'content'?"),
        ({"role": "assistant"}, "messages.0", "needs content, or tool_calls"),
        ({"role": "tool", "content": ""}, "messages.0.tool_call_id", "is required"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.0.content.0.type",
            "expected 'text', got \"image_url\"",
        ),
    ],
)
def test_faults_of_messages(message: Any, param: str, says: str) -> None:
    error = refused(ChatRequest, {"messages": [message]})
    assert says in str(error)
    assert error.param == param


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("best_of", "That is a field of /v1/completions"),
        ("prompt", "That is a field of /v1/completions"),
        ("n_predict", "What is meant is 'max_tokens' here."),
        ("max_new_tokens", "What is meant is 'max_tokens' here."),
        ("json_schema", "What is meant is 'response_format' here."),
        ("stop_token_ids", "What is meant is 'stop_ids' here."),
        ("min_tokens", "What is meant is 'min_new_tokens' here."),
        ("cache_prompt", "There is nothing like it here"),
        ("max_token", "Did you mean 'max_tokens'?"),
        ("suffix", "Leave it out."),
        ("num_beams", "Leave it out."),
        ("mirostat", "Leave it out."),
    ],
)
def test_names_that_others_have(name: str, says: str) -> None:
    error = refused(ChatRequest, {"messages": HELLO, name: 1})
    assert str(error).startswith(f"unknown field {name!r}. ") and says in str(error)
    assert error.param == name


def test_every_name_that_is_offered_is_there() -> None:
    for shape in (ChatRequest, CompletionRequest):
        assert set(OTHER_NAMES.values()) <= set(shape.model_fields)
        assert NOT_HERE.isdisjoint(shape.model_fields)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"messages": []}, "'messages': expected a list that is not empty"),
        ({"max_tokens": 0}, "'max_tokens': expected at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "give one of them"),
        ({"top_logprobs": 1}, "goes with logprobs: true"),
        ({"logprobs": 1}, "'logprobs': expected true or false, got 1"),
        ({"logprobs": True, "top_logprobs": 21}, "expected at most 20"),
        ({"response_format": {"type": "xml"}}, "one of 'text', 'json_object', 'json_schema', got \"xml\""),
        ({"response_format": {"type": "json_schema"}}, "'response_format.json_schema' is required"),
        ({"tool_choice": "maybe"}, "expected 'none', 'auto' or 'required' or an object, got \"maybe\""),
        ({"tools": [{"type": "magic"}]}, "'tools.0.type': expected 'function'"),
    ],
)
def test_faults_of_chat_requests(more: Any, says: str) -> None:
    assert says in str(refused(ChatRequest, {"messages": HELLO, **more}))


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a", *[1] * 300_000]},
        {"prompt": "a", **{f"a{number}": 1 for number in range(300_000)}},
        {"prompt": "a", "logit_bias": {f"a{number}": 1 for number in range(300_000)}},
        {"prompt": "a", "logit_bias": {f"a{number}": 1 for number in range(9_000)}},
        {"prompt": "a", "stop": [1] * 300_000},
    ],
    ids=["items", "fields", "keys", "fewer keys", "texts"],
)
def test_a_body_wrong_in_many_places_is_refused_soon(body: Any) -> None:
    raw = json.dumps(body).encode()
    began = time.perf_counter()
    error = refused(CompletionRequest, raw)
    assert time.perf_counter() - began < 1
    assert len(str(error)) < 500

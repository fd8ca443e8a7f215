"""Single fields through HTTP: their bounds, what stands for what, and faults that are told by their field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from puna.serve import sampling
from tests.serve.running import Running, chunks_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Tell me a story"}]


def texts_of(server: Running, **body: Any) -> list[str]:
    """Of the answers to a prompt."""
    response = server.post(TEXT, {"prompt": "def ", "max_tokens": 8, **body})
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def error_of(server: Running, path: str, **body: Any) -> Any:
    """What is said of a request at fault."""
    needed = {"messages": HELLO} if path == CHAT else {"prompt": "def "}
    response = server.post(path, {**needed, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "says"),
    [
        (TEXT, {"prompt": [9999]}, "prompt", "token id 9999"),
        (TEXT, {"stop_ids": [9999]}, "stop_ids", "stop_ids: 9999"),
        (TEXT, {"logit_bias": {"9999": 1}}, "logit_bias", "logit_bias: 9999"),
        (TEXT, {"regex": "("}, "regex", "regex: "),
        (CHAT, {"regex": "(?=a)"}, "regex", "regex: the regular expression has a look-around"),
        (CHAT, {"grammar": "nonsense"}, "grammar", "grammar: the grammar"),
        (CHAT, {"regex": "a" * 5000}, "regex", "regex: regex has 5000 characters"),
        (TEXT, {"regex": "a", "stop": "b"}, "stop", "regex and stop contradict each other"),
        (TEXT, {"regex": "a", "choice": ["b"]}, "choice", "regex and choice contradict each other"),
        (
            TEXT,
            {"response_format": {"type": "json_object"}, "regex": "a"},
            "regex",
            "response_format and regex",
        ),
        (TEXT, {"min_new_tokens": 17}, "min_new_tokens", "raise max_tokens"),
        (CHAT, {"stop": ["a" * 60_000] * 2}, "stop", "100,000 characters"),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "give one of them"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs", "goes with logprobs"),
        (CHAT, {"stream_options": {}}, "stream_options", "goes with stream"),
    ],
)
def test_faults_are_told_by_their_field(
    server: Running, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    error = error_of(server, path, **fields)
    assert (error["param"], says in error["message"]) == (param, True), error
    assert "max_new_tokens" not in error["message"]


def test_a_prompt_longer_than_the_context_has_a_code(server: Running) -> None:
    long = "word " * 600
    for path, fields, param in (
        (TEXT, {"prompt": long}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": long}]}, "messages"),
    ):
        error = error_of(server, path, **fields)
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert 'this model takes 512, the answer included; shorten it, or give overflow "' in error["message"]


def test_any_integer_of_64_bits_is_a_seed(server: Running) -> None:
    assert texts_of(server, seed=-1) == texts_of(server, seed=2**63 - 1)
    assert texts_of(server, seed=-(2**63)) == texts_of(server, seed=0)
    assert texts_of(server, seed=-5) != texts_of(server, seed=5)


def test_top_k_of_minus_one_is_all(server: Running) -> None:
    assert texts_of(server, seed=1, top_k=-1) == texts_of(server, seed=1, top_k=0) == texts_of(server, seed=1)


def test_max_tokens_beyond_the_context_is_cut_to_it(story_server: Running) -> None:
    body = {"prompt": "Once upon", "max_tokens": 10**9, "ignore_eos": True, "temperature": 0}
    response = story_server.post(TEXT, body).json()
    assert response["usage"]["total_tokens"] == 512
    assert response["choices"][0]["finish_reason"] == "length"


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_a_form(server: Running, stream: bool) -> None:
    body = {"prompt": "def ", "max_tokens": 40, "seed": 2, "response_format": FORM, "stream": stream}
    response = server.post(TEXT, body)
    choices = (
        [choice for chunk in chunks_of(response) for choice in chunk["choices"]]
        if stream
        else response.json()["choices"]
    )
    assert json.loads("".join(choice["text"] for choice in choices))["a"] in (1, 2)
    assert choices[-1]["finish_reason"] == "stop"


def test_a_form_of_completions_that_is_none(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}
    error = error_of(server, TEXT, response_format=form)
    assert error["param"] == "response_format" and "wrong" in error["message"]
    assert error_of(server, TEXT, response_format=FORM, ignore_eos=True)["param"] == "ignore_eos"
    assert error_of(server, TEXT, response_format={"type": "xml"})["param"] == "response_format"


def test_log_probabilities_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """By answers × the longest answer × those listed in each place."""
    monkeypatch.setattr(sampling, "MOST_ENTRIES", 60)
    listed: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1}
    error = error_of(server, CHAT, **listed, max_tokens=11)
    assert error["param"] == "top_logprobs" and "66 log-probabilities, and 60" in error["message"]
    for fields in ({"max_tokens": 10}, {}):
        answer = server.post(CHAT, {"messages": HELLO, **listed, "ignore_eos": True, **fields}).json()
        assert [len(choice["logprobs"]["content"]) for choice in answer["choices"]] == [10, 10]
    assert len(texts_of(server, logprobs=2, n=2, max_tokens=10)) == 2
    for more in ({"best_of": 3}, {"prompt": ["a", "b"]}, {"echo": True}):
        error = error_of(server, TEXT, **{"logprobs": 2, "n": 2, "max_tokens": 10, **more})
        assert error["param"] == "logprobs"

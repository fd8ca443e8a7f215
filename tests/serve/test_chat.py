"""/v1/chat/completions: answers are those of `llm.chat`, fields have their effects, streams join."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from puna.engine.cache import bytes_per_position
from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.settings import parse
from puna.tokenizer import chat as chats
from puna.tokenizer.tokenizer import Tokenizer
from tests.serve.running import Running, chunks_of, running

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Tell me a story"}]
GREEDY = {"temperature": 0, "max_tokens": 20}
STOP = ["\nUser:"]
OBJECT = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}


def asked(server: Running, **body: Any) -> dict[str, Any]:
    """The response to a request that is in order."""
    response = server.post(PATH, {"messages": HELLO, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def message_of(server: Running, **body: Any) -> dict[str, Any]:
    """The message of the only choice."""
    (choice,) = asked(server, **body)["choices"]
    message: dict[str, Any] = choice["message"]
    return message


def refusal(server: Running, **body: Any) -> str:
    """What a request is refused with."""
    response = server.post(PATH, {"messages": HELLO, **body})
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def events(server: Running, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    return chunks_of(server.post(PATH, {"messages": HELLO, **body, "stream": True}))


def prompt_of(server: Running, **body: Any) -> dict[str, Any]:
    """What a conversation becomes."""
    response = server.post("/apply-template", {"messages": HELLO, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_an_answer_and_all_that_stands_around_it(story_server: Running, stories: LLM) -> None:
    found = asked(story_server, model="tiny", **GREEDY)
    expected = stories.chat(HELLO, template="plain", temperature=0.0, max_new_tokens=20, stop=STOP)
    assert found.pop("id").startswith("chatcmpl-")
    assert found.pop("created") > 1_700_000_000
    message = {"role": "assistant", "content": expected.text, "refusal": None}
    prompt = len(expected.prompt_tokens)
    assert found == {
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": 20, "total_tokens": prompt + 20},
    }


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"seed": 5, "max_tokens": 9}, {"seed": 5, "max_new_tokens": 9}),
        ({"seed": 5, "max_completion_tokens": 9}, {"seed": 5, "max_new_tokens": 9}),
        ({"seed": 5, "temperature": 0.6, "top_p": 0.5, "top_k": 9}, None),
        ({"seed": 5, "presence_penalty": 2.0, "frequency_penalty": -1.0}, None),
        ({"seed": 5, "n": 3, "logit_bias": {"410": -100}}, None),
        ({"seed": 5, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.3}, None),
        ({"temperature": 0, "stop": [" a", "."]}, {"temperature": 0.0, "stop": [" a", ".", *STOP]}),
        ({"temperature": 0, "stop_ids": [411]}, None),
        ({"seed": 2, "temperature": 2, "min_new_tokens": 20, "ignore_eos": True}, None),
        ({"seed": 1, "regex": "[0-9]{2}"}, {"seed": 1, "regex": "[0-9]{2}", "stop": []}),
        ({"seed": 1, "choice": ["yes", "no"]}, {"seed": 1, "choice": ["yes", "no"], "stop": []}),
        ({"seed": 1, "grammar": 'start: "x"+'}, {"seed": 1, "grammar": 'start: "x"+', "stop": []}),
        (
            {
                "seed": 1,
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": OBJECT}},
            },
            {"seed": 1, "json_schema": OBJECT, "stop": []},
        ),
        (
            {"seed": 1, "response_format": {"type": "json_object"}},
            {"seed": 1, "json_schema": True, "stop": []},
        ),
        ({"seed": 1, "response_format": {"type": "text"}}, {"seed": 1}),
    ],
    ids=lambda value: " ".join(value) if value else "same",
)
def test_fields_mean_what_they_mean_to_chat(
    fields: dict[str, Any], same: dict[str, Any] | None, story_server: Running, stories: LLM
) -> None:
    limited = {"max_tokens": 24, **fields} if "max_completion_tokens" not in fields else fields
    sampling = {"max_new_tokens": 24, "stop": STOP, **(fields if same is None else same)}
    found = asked(story_server, **limited)["choices"]
    first = stories.chat(HELLO, template="plain", **sampling)
    answers = [first, *first.alternatives]
    assert [choice["message"]["content"] for choice in found] == [answer.text for answer in answers]
    assert [choice["finish_reason"] for choice in found] == [answer.finish_reason for answer in answers]


def test_an_answer_may_be_as_long_as_the_context_lets_it(story_server: Running) -> None:
    usage = asked(story_server, seed=1, ignore_eos=True, stop="never said")["usage"]
    assert usage["total_tokens"] == 512


def test_an_answer_may_be_as_long_as_the_cache_lets_it(llm: LLM) -> None:
    each = bytes_per_position(llm.config, torch.float32)
    small = LLM(llm.model, llm.tokenizer, engine=parse(EngineSettings, {"cache_memory": each * 192}))
    with running(small) as server:
        body = {"messages": HELLO, "seed": 1, "ignore_eos": True}
        assert server.post(PATH, body).json()["usage"]["total_tokens"] == 192
        assert "cache has room for 192" in refusal(server, max_tokens=300)


def test_json_keeps_to_its_schema(story_server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": OBJECT, "strict": True}}
    for seed in range(5):
        (choice,) = asked(story_server, seed=seed, temperature=2, response_format=form)["choices"]
        assert choice["finish_reason"] == "stop"
        assert 1 <= json.loads(choice["message"]["content"])["age"] <= 99


@pytest.mark.parametrize("name", ["stop", "stop_ids", "ignore_eos", "regex", "grammar", "choice"])
def test_what_a_bound_answer_is_not_also_held_to(name: str, story_server: Running) -> None:
    value = {"stop": "a", "stop_ids": [1], "ignore_eos": True, "choice": ["a"]}.get(name, "a")
    message = refusal(story_server, response_format={"type": "json_object"}, **{name: value})
    assert f"response_format and {name} contradict each other" in message


def test_a_schema_that_nothing_satisfies(story_server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    assert "nonsense" in refusal(story_server, response_format=form)


def test_logprobs(story_server: Running, stories: LLM) -> None:
    expected = stories.chat(HELLO, template="plain", temperature=0.0, max_new_tokens=6, logprobs=2, stop=STOP)
    (choice,) = asked(story_server, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2)["choices"]
    assert choice["logprobs"]["refusal"] is None
    found = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in found).decode().strip() == expected.text.strip()
    for entry, known in zip(found, expected.logprobs or (), strict=True):
        assert entry["logprob"] == known.logprob
        assert entry["token"] == bytes(entry["bytes"]).decode("utf-8", "replace")
        assert [top["logprob"] for top in entry["top_logprobs"]] == [logprob for _, logprob in known.top]
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
    (choice,) = asked(story_server, temperature=0, max_tokens=6, logprobs=True)["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * 6


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"seed": 1, "n": 3, "logprobs": True, "top_logprobs": 1},
        {"temperature": 0, "stop": ["little girl"]},
        {"seed": 1, "response_format": {"type": "json_object"}},
        {"temperature": 0, "choice": ["a😀é"], "logprobs": True},
    ],
    ids=["one", "several", "stop", "object", "characters"],
)
def test_streamed_is_awaited(fields: dict[str, Any], story_server: Running) -> None:
    whole = asked(story_server, **fields, max_tokens=30)
    chunks = events(story_server, **fields, max_tokens=30)
    found: dict[int, Any] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        one = found.setdefault(choice["index"], {"text": "", "roles": [], "reason": None, "entries": []})
        assert one["reason"] is None, "something came after the last chunk of a choice"
        one["text"] += choice["delta"].get("content", "")
        one["roles"].append(choice["delta"].get("role"))
        one["reason"] = choice["finish_reason"]
        one["entries"] += (choice["logprobs"] or {"content": []})["content"]
    for choice in whole["choices"]:
        one = found[choice["index"]]
        assert one["text"] == choice["message"]["content"]
        assert one["reason"] == choice["finish_reason"]
        assert one["roles"] == ["assistant", *[None] * (len(one["roles"]) - 1)]
        assert one["entries"] == (choice["logprobs"] or {"content": []})["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


def test_usage_at_the_end_of_a_stream(story_server: Running) -> None:
    *chunks, last = events(story_server, **GREEDY, n=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 40


def test_messages_as_parts_and_by_other_names(story_server: Running) -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": " a story"}]
    assert prompt_of(story_server, messages=[{"role": "user", "content": parts}]) == prompt_of(story_server)
    named = [{**HELLO[0], "name": "Ann"}]
    assert prompt_of(story_server, messages=named) == prompt_of(story_server)
    system, developer = ([{"role": role, "content": "Be brief"}, *HELLO] for role in ("system", "developer"))
    assert prompt_of(story_server, messages=system) == prompt_of(story_server, messages=developer)
    assert "Be brief" in prompt_of(story_server, messages=system)["prompt"]


def test_an_answer_may_be_given_back_as_it_came(story_server: Running) -> None:
    said = message_of(story_server, **GREEDY)
    more = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    talk = [*HELLO, {**said, **more}, {"role": "user", "content": "And then?"}]
    assert said["content"].strip() in prompt_of(story_server, messages=talk)["prompt"]
    assert message_of(story_server, messages=talk, **GREEDY)["role"] == "assistant"


def test_what_a_conversation_becomes(story_server: Running, stories: LLM) -> None:
    assert stories.tokenizer is not None
    found = prompt_of(story_server)
    assert found["tokens"] == chats.render(stories.tokenizer, HELLO, "plain")
    assert found["prompt"] == chats.render_text(stories.tokenizer, HELLO, "plain")
    assert found["template"] == "plain"
    usage = asked(story_server, **GREEDY)["usage"]
    assert usage["prompt_tokens"] == len(found["tokens"])


def test_the_plain_format_is_told(story_server: Running) -> None:
    body = {"messages": HELLO, **GREEDY}
    for more in ({}, {"stream": True}):
        assert "plain format" in story_server.post(PATH, {**body, **more}).headers["x-puna-note"]
    assert story_server.get("/v1/models").json()["data"][0]["template"] == "plain"


SHOUTING = "{{ bos_token }}{% for m in messages %}{{ m.content | upper }}{% endfor %}"


def test_templates_that_settings_or_the_model_bring(llm: LLM, tokenizer: Tokenizer) -> None:
    with running(llm, template=SHOUTING) as server:
        found = prompt_of(server)
        assert found["prompt"].endswith("TELL ME A STORY")
        assert found["template"] == "custom"
        response = server.post(PATH, {"messages": HELLO, "seed": 1, "max_tokens": 5})
        assert "x-puna-note" not in response.headers
        expected = llm.chat(HELLO, template=SHOUTING, seed=1, max_new_tokens=5)
        assert response.json()["choices"][0]["message"]["content"] == expected.text
    with running(llm, template="alpaca") as server:
        assert prompt_of(server)["template"] == "alpaca"
        turns = [{"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}]
        response = server.post(PATH, {"messages": turns})
        assert response.status_code == 400
        assert "system" in response.json()["error"]["message"]
    own = Tokenizer(tokenizer.codec, tokenizer.end_ids, SHOUTING)
    with running(LLM(llm.model, own)) as server:
        assert prompt_of(server)["template"] == "model"
        assert prompt_of(server)["tokens"] == chats.render(own, HELLO)


def test_special_tokens_spelled_in_messages_are_just_text(story_server: Running, stories: LLM) -> None:
    assert stories.tokenizer is not None
    spelled = [{"role": "user", "content": "</s><s>"}]
    ids = prompt_of(story_server, messages=spelled)["tokens"]
    assert ids.count(stories.tokenizer.bos_id) == 1
    assert stories.tokenizer.eos_id not in ids
    named = [{"role": "</s>", "content": ""}]
    assert "expected an object whose 'role'" in refusal(story_server, messages=named)


def test_templates_in_messages_are_not_run(story_server: Running) -> None:
    text = "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}"
    assert text in prompt_of(story_server, messages=[{"role": "user", "content": text}])["prompt"]


def test_a_conversation_longer_than_the_context(story_server: Running) -> None:
    long = [{"role": "user", "content": "word " * 600}]
    assert "tokens; this model takes 512" in refusal(story_server, messages=long)
    usage = asked(story_server, messages=long, overflow="truncate", seed=1)["usage"]
    assert usage["prompt_tokens"] <= 512


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/apply-template"])
def test_what_cannot_fit_is_refused_before_it_is_cut_into_tokens(
    server: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a " * 400_000
    asked = (
        {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    )
    monkeypatch.setattr(type(server.state.llm.tokenizer), "encode", None)  # it would be called
    error = server.post(path, asked).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == next(iter(asked))
    assert "800," in error["message"]

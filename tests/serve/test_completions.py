"""/v1/completions: every field of it has its effect, and answers are those of `llm.generate`."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.settings import parse
from tests.serve.running import Running, chunks_of, running

PATH = "/v1/completions"
ONCE = "Once upon a time"
GREEDY = {"temperature": 0, "max_tokens": 12}


def asked(server: Running, **body: Any) -> dict[str, Any]:
    """The response to a request that is in order."""
    response = server.post(PATH, body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def text_of(server: Running, **body: Any) -> str:
    """The text of the only choice."""
    (choice,) = asked(server, **body)["choices"]
    return str(choice["text"])


def refusal(server: Running, **body: Any) -> str:
    """What a request is refused with."""
    response = server.post(PATH, body)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def events(server: Running, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    return chunks_of(server.post(PATH, {**body, "stream": True}))


def test_an_answer_and_all_that_stands_around_it(story_server: Running, stories: LLM) -> None:
    found = asked(story_server, model="tiny", prompt=ONCE, **GREEDY)
    expected = stories.generate(ONCE, temperature=0.0, max_new_tokens=12)
    assert found.pop("id").startswith("cmpl-")
    assert found.pop("created") > 1_700_000_000
    assert found == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17},
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 5},
        {"seed": 5, "temperature": 0.7},
        {"seed": 5, "top_p": 0.5},
        {"seed": 5, "top_k": 3},
        {"seed": 5, "min_p": 0.2},
        {"seed": 5, "typical_p": 0.4},
        {"seed": 5, "presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"temperature": 0.0, "repetition_penalty": 1.8},
        {"temperature": 0.0, "logit_bias": {"403": 50.0}},
        {"temperature": 0.0, "stop": "."},
        {"temperature": 0.0, "stop": ["zzz", "little"]},
        {"temperature": 0.0, "stop_ids": [411]},
        {"seed": 3, "n": 3},
        {"seed": 3, "n": 2, "best_of": 4},
        {"temperature": 0.0, "regex": "[a-z ]{4,9}"},
        {"temperature": 0.0, "choice": [" there", " was a dog"]},
        {"temperature": 0.0, "grammar": 'start: "a" | "bc"'},
        {"seed": 1, "temperature": 2.0, "min_new_tokens": 30, "ignore_eos": True},
    ],
    ids=" ".join,
)
def test_fields_mean_what_they_mean_to_generate(
    fields: dict[str, Any], story_server: Running, stories: LLM
) -> None:
    found = asked(story_server, prompt=ONCE, max_tokens=30, **fields)
    first = stories.generate(ONCE, max_new_tokens=30, **fields)
    answers = [first, *first.alternatives]
    assert [choice["text"] for choice in found["choices"]] == [answer.text for answer in answers]
    assert [choice["finish_reason"] for choice in found["choices"]] == [a.finish_reason for a in answers]
    assert [choice["index"] for choice in found["choices"]] == list(range(len(answers)))


def test_the_defaults_are_those_of_openai(story_server: Running, stories: LLM) -> None:
    assert asked(story_server, prompt=ONCE)["usage"]["completion_tokens"] == 16
    assert (
        text_of(story_server, prompt=ONCE, seed=9) == stories.generate(ONCE, seed=9, max_new_tokens=16).text
    )


def test_temperature_0_is_greedy_whatever_else_is_drawn_by(story_server: Running) -> None:
    texts = {text_of(story_server, prompt=ONCE, seed=seed, **GREEDY, top_p=0.3) for seed in range(4)}
    assert len(texts) == 1
    assert text_of(story_server, prompt=ONCE, top_p=0, max_tokens=12) in texts


def test_without_a_seed_answers_differ(story_server: Running) -> None:
    assert len({text_of(story_server, prompt=ONCE, max_tokens=30, temperature=2) for _ in range(4)}) > 1


def test_prompts_as_ids_and_in_batches(story_server: Running, stories: LLM) -> None:
    assert stories.tokenizer is not None
    texts = [ONCE, "", "The cat"]
    ids = [stories.tokenizer.encode(text) for text in texts]
    expected = [stories.generate(text, temperature=0.0, max_new_tokens=12).text for text in texts]
    for prompts in (texts, ids):
        found = asked(story_server, prompt=prompts, **GREEDY)
        assert [choice["text"] for choice in found["choices"]] == expected
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert text_of(story_server, prompt=ids[0], **GREEDY) == expected[0]
    # Those to the first prompt are numbered first; all share the seed.
    several = asked(story_server, prompt=texts, n=2, seed=4, max_tokens=9)["choices"]
    alone = [asked(story_server, prompt=text, n=2, seed=4, max_tokens=9)["choices"] for text in texts]
    assert [c["text"] for c in several] == [c["text"] for choices in alone for c in choices]
    assert [c["index"] for c in several] == [0, 1, 2, 3, 4, 5]


def test_special_tokens_spelled_in_a_prompt_are_just_text(story_server: Running, stories: LLM) -> None:
    assert stories.tokenizer is not None
    found = asked(story_server, prompt="</s><s>", **GREEDY)
    ids = stories.tokenizer.encode("</s><s>")
    assert stories.tokenizer.eos_id not in ids
    assert found["usage"]["prompt_tokens"] == len(ids) > 3


def test_usage_counts_all_that_was_produced(story_server: Running, stories: LLM) -> None:
    usage = asked(story_server, prompt=[ONCE, ONCE], n=2, best_of=3, seed=1, max_tokens=7)["usage"]
    assert usage == {"prompt_tokens": 10, "completion_tokens": 42, "total_tokens": 52}
    ended = stories.generate(ONCE, temperature=0.0, max_new_tokens=30, stop_ids=[411])
    found = asked(story_server, prompt=ONCE, temperature=0, max_tokens=30, stop_ids=[411])
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == len(ended.tokens)


def test_echo_and_logprobs(story_server: Running, stories: LLM) -> None:
    expected = stories.generate(ONCE, temperature=0.0, max_new_tokens=4, logprobs=2, prompt_logprobs=2)
    (choice,) = asked(story_server, prompt=ONCE, temperature=0, max_tokens=4, logprobs=2, echo=True)[
        "choices"
    ]
    assert choice["text"] == ONCE + expected.text
    lists = choice["logprobs"]
    assert lists["tokens"] == ["<s>", " Once", " upon", " a", " time", ",", " there", " was", " a"]
    assert lists["text_offset"] == [0, 0, 4, 9, 11, 16, 17, 23, 27]
    entries = [*(expected.prompt_logprobs or ()), *(expected.logprobs or ())]
    assert lists["token_logprobs"] == [None if entry is None else entry.logprob for entry in entries]
    assert lists["top_logprobs"][0] is None
    for found, entry in zip(lists["top_logprobs"][1:], entries[1:], strict=True):
        assert entry is not None
        assert sorted(found.values())[-2:] == sorted(logprob for _, logprob in entry.top)
        assert found[lists["tokens"][entries.index(entry)]] == entry.logprob
    (alone,) = asked(story_server, prompt=ONCE, temperature=0, max_tokens=4, logprobs=2)["choices"]
    assert alone["logprobs"] == {
        **{name: values[5:] for name, values in lists.items()},
        "text_offset": [offset - len(ONCE) for offset in lists["text_offset"][5:]],
    }


def test_a_prompt_is_scored_without_an_answer(story_server: Running, stories: LLM) -> None:
    expected = stories.generate(ONCE, max_new_tokens=1, prompt_logprobs=0).prompt_logprobs
    assert expected is not None
    found = asked(story_server, prompt=ONCE, max_tokens=0, echo=True, logprobs=0)
    (choice,) = found["choices"]
    assert choice["text"] == ONCE
    assert choice["logprobs"]["token_logprobs"] == [
        None if entry is None else entry.logprob for entry in expected
    ]
    assert choice["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    (chunk,) = events(story_server, prompt=ONCE, max_tokens=0, echo=True, logprobs=0)
    assert chunk["choices"] == [choice]


def test_the_end_token_is_not_listed(story_server: Running, stories: LLM) -> None:
    fields = {"temperature": 0, "max_tokens": 30, "stop_ids": [411], "logprobs": 0}
    (choice,) = asked(story_server, prompt=ONCE, **fields)["choices"]
    expected = stories.generate(ONCE, temperature=0.0, max_new_tokens=30, stop_ids=[411])
    assert expected.tokens[-1] == 411
    assert len(choice["logprobs"]["tokens"]) == len(expected.tokens) - 1
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    streamed = events(story_server, prompt=ONCE, **fields)
    assert [t for c in streamed for t in (c["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == (
        choice["logprobs"]["tokens"]
    )


def test_characters_of_several_tokens(story_server: Running) -> None:
    (choice,) = asked(story_server, prompt=ONCE, temperature=0, choice=["a😀é"], logprobs=0, max_tokens=9)[
        "choices"
    ]
    lists = choice["logprobs"]
    assert choice["text"] == "a😀é"
    assert lists["tokens"] == ["a", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "é"]
    assert lists["text_offset"] == [0, 1, 1, 1, 1, 2]


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By choice: its text, its reason, and its log-probabilities' lists."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": {}})
            assert one["finish_reason"] is None, "something came after the last chunk of a choice"
            one["text"] += choice["text"]
            one["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                one["logprobs"].setdefault(name, []).extend(values)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ONCE, "seed": 1},
        {"prompt": [ONCE, "The cat"], "n": 2, "seed": 1, "logprobs": 2},
        {"prompt": [[1, 403], [1, 403, 407]], "temperature": 0, "echo": True, "logprobs": 1},
        {"prompt": ONCE, "temperature": 0, "stop": [" little girl"]},
        {"prompt": "", "temperature": 0, "choice": ["a😀é"], "logprobs": 0},
    ],
    ids=["one", "several", "echo", "stop", "characters"],
)
def test_streamed_is_awaited(fields: dict[str, Any], story_server: Running) -> None:
    whole = asked(story_server, **fields, max_tokens=20)
    chunks = events(story_server, **fields, max_tokens=20)
    assert joined(chunks) == {
        choice["index"]: {
            "text": choice["text"],
            "finish_reason": choice["finish_reason"],
            "logprobs": choice["logprobs"] or {},
        }
        for choice in whole["choices"]
    }
    assert {
        (chunk["id"], chunk["object"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks
    } == {(chunks[0]["id"], "text_completion", "tiny", "fp_1")}
    assert all("usage" not in chunk for chunk in chunks)


def test_text_arrives_while_more_is_being_computed(
    story_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = story_server.state.llm.engine
    step, gate, begun = engine.step, threading.Event(), 0

    def held() -> bool:
        nonlocal begun
        begun += 1
        return step() if begun <= 4 or gate.wait(60) else False

    monkeypatch.setattr(engine, "step", held)
    body = {"prompt": ONCE, **GREEDY, "stream": True}
    try:
        with story_server.client.stream("POST", PATH, json=body) as response:
            lines = response.iter_lines()
            first = next(lines)  # times out when text waits for the end
            gate.set()
            rest = list(lines)
    finally:
        gate.set()
    assert rest[-2:] == ["data: [DONE]", ""]
    late_lines = [line.removeprefix("data: ") for line in rest[:-2] if line]
    early = joined([json.loads(first.removeprefix("data: "))])[0]
    late = joined([json.loads(line) for line in late_lines])[0]
    assert early["finish_reason"] is None and early["text"]
    assert late["finish_reason"] == "length" and late["text"]
    assert early["text"] + late["text"] == text_of(story_server, prompt=ONCE, **GREEDY)


def test_usage_at_the_end_of_a_stream(story_server: Running) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    *chunks, last = events(story_server, prompt=ONCE, **GREEDY, n=2, stream_options=options)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29}
    assert (
        "usage"
        not in events(story_server, prompt=ONCE, **GREEDY, stream_options={"include_usage": False})[-1]
    )


def test_what_streams_is_not_kept_by_anything_between(story_server: Running) -> None:
    headers = story_server.post(PATH, {"prompt": ONCE, "stream": True}).headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"


def test_longer_than_the_context(story_server: Running, stories: LLM) -> None:
    ids = [1, *[403] * 600]
    assert "601 tokens" in refusal(story_server, prompt=ids)
    for overflow in ("truncate", "slide"):
        found = asked(story_server, prompt=ids, overflow=overflow, temperature=0, max_tokens=20, echo=True)
        expected = stories.generate(ids, overflow=overflow, temperature=0.0, max_new_tokens=20)
        assert found["usage"]["prompt_tokens"] == len(expected.prompt_tokens) < 512
        assert found["choices"][0]["text"].endswith(expected.text)
    assert (
        asked(story_server, prompt=ONCE, temperature=0, max_tokens=9999)["usage"]["completion_tokens"] < 512
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": [9999]}, "token id 9999 is not in the model's vocabulary"),
        ({"prompt": "a", "stop_ids": [9999]}, "stop_ids: 9999"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias: 9999"),
        ({"prompt": "a", "regex": "("}, "regular expression"),
        ({"prompt": "a", "grammar": "nonsense"}, "grammar"),
        ({"prompt": "a", "regex": "a", "stop": "b"}, "regex and stop contradict each other"),
        ({"prompt": "a", "regex": "a", "choice": ["b"]}, "regex and choice contradict each other"),
        ({"prompt": "a", "min_new_tokens": 17}, "min_new_tokens 17 is above the longest answer, of 16"),
        ({"prompt": ["a"] * 40, "n": 9}, "360 answers are asked for at once"),
    ],
)
def test_what_the_engine_refuses(fields: dict[str, Any], says: str, story_server: Running) -> None:
    assert says in refusal(story_server, **fields)


def test_fields_that_cannot_change_the_answer_are_taken(story_server: Running) -> None:
    nothing = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "flex",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "prompt_cache_retention": "24h",
    }
    assert text_of(story_server, prompt=ONCE, **GREEDY, **nothing) == text_of(
        story_server, prompt=ONCE, **GREEDY
    )


def test_another_model_is_not_found(story_server: Running) -> None:
    response = story_server.post(PATH, {"prompt": ONCE, "model": "gpt-4"})
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "the model 'gpt-4' is not served here; the one that is: 'tiny'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    for name in ("tiny", "models/tiny", None):  # by its id, by the path it was given as, or not at all
        assert asked(story_server, prompt=ONCE, model=name, **GREEDY)["model"] == "tiny"


def test_a_model_without_tokenizer(llm: LLM) -> None:
    alone = LLM(llm.model)
    with running(alone) as server:
        assert "no tokenizer" in refusal(server, prompt="text")
        assert "this model has none" in refusal(server, prompt=[1, 2], stop="a")
        ids = [1, 5, 9]
        expected = alone.generate(ids, temperature=0.0, max_new_tokens=5, logprobs=1)
        found = asked(server, prompt=ids, temperature=0, max_tokens=5, logprobs=1, echo=True)
        (choice,) = found["choices"]
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in (*ids, *expected.tokens)]
        assert found["usage"]["completion_tokens"] == 5
        for path in ("/v1/chat/completions", "/apply-template"):
            response = server.post(path, {"messages": [{"role": "user", "content": "hello"}]})
            assert response.status_code == 400
            assert "no tokenizer" in response.json()["error"]["message"]
        assert server.get("/v1/models").json()["data"][0]["template"] is None


def test_a_full_queue(llm: LLM) -> None:
    small = LLM(llm.model, llm.tokenizer, engine=parse(EngineSettings, {"max_running": 2}))
    long = {"prompt": "a", "temperature": 0, "max_tokens": 400, "ignore_eos": True}
    with running(small, max_waiting=1) as server:
        assert "makes 3 at most" in refusal(server, **long, n=4)
        with server.client.stream("POST", PATH, json={**long, "n": 3, "stream": True}) as busy:
            lines = busy.iter_lines()
            next(lines)
            full = server.post(PATH, long)
            assert full.status_code == 429
            assert full.json()["error"]["code"] == "queue_full"
            assert int(full.headers["retry-after"]) >= 1
            assert [*lines][-2] == "data: [DONE]"
        assert asked(server, **long)["usage"]["completion_tokens"] == 400

"""The API keeps to its own description, whatever is asked: no server error, nothing undescribed."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from puna.engine.llm import LLM
from puna.model.config import ModelConfig
from puna.serve import answers
from puna.serve.app import make_app
from puna.serve.description import FAULTS
from puna.serve.guard import Guard
from puna.serve.keys import Keys
from puna.serve.logs import Log
from puna.serve.metrics import Metrics
from puna.serve.origins import Origins
from puna.serve.state import ServerState
from puna.tokenizer.tokenizer import Tokenizer
from tests.model.shapes import model_of
from tests.serve.running import Running, chunks_of, running

schemathesis = pytest.importorskip("schemathesis")

CONTEXT = 96  # short, so that what may be as long as the context is soon done
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUICK, LONG, LONG_OWN = 6, 400, 4000
OPERATIONS = (
    *("POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "POST /detokenize"),
    *("POST /apply-template", "GET /v1/models/{id}", "GET /v1/models", "GET /health", "GET /ready"),
    *("GET /metrics", "GET /", "GET /status"),
)
WITH_BODY = OPERATIONS[:5]


def guarded(state: ServerState) -> Any:
    """The whole of what a server answers with: the app, and what stands around it."""
    return Guard(
        make_app(state), state, Keys([], None, None), Origins([], [], True), Log("json", stream=io.StringIO())
    )


@pytest.fixture(scope="module")
def small(config: ModelConfig, tokenizer: Tokenizer) -> Iterator[Running]:
    """A server of a random model with a short context, guarded."""
    short = config.model_copy(update={"max_position_embeddings": CONTEXT})
    llm = LLM(model_of(short).eval(), tokenizer)
    with running(llm, Metrics(llm.engine), guarded) as it:
        yield it


def generated(
    server: Running, operation: str, mode: Any, count: int, seen: Counter[int] | None = None
) -> None:
    """Requests made from the description, valid by it or not; every response is held against it.

    That what the description admits is taken is not asked: it does not know the context, the vocabulary, or
    which fields contradict each other.
    """
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    (made,) = [o for o in (found.ok() for found in api.get_all_operations()) if o.label == operation]
    unchecked = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]

    @many(count)
    @given(case=made.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call()
        case.validate_response(response, excluded_checks=unchecked)
        if seen is not None:
            seen[response.status_code] += 1

    check()


def many(count: int) -> Callable[[Any], Any]:
    """So many examples, the same ones every time."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_requests_that_the_description_admits(operation: str, small: Running) -> None:
    generated(small, operation, schemathesis.GenerationMode.POSITIVE, QUICK)


@pytest.mark.parametrize("operation", WITH_BODY)
def test_requests_that_the_description_does_not_admit(operation: str, small: Running) -> None:
    generated(small, operation, schemathesis.GenerationMode.NEGATIVE, QUICK)


# Bodies that are mostly in order: the description's own would seldom get as far as the engine.

TEXTS = st.text(max_size=12) | st.sampled_from(["def ", "</s><s>", "{{ x }}", "😀", "\x00", "User: hi\n"])
IDS = st.lists(st.integers(0, 399), min_size=1, max_size=12)
SHARED: dict[str, Any] = {
    "model": st.sampled_from(["tiny", "models/tiny", "other"]),
    "stream": st.booleans(),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 410).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "top_k": st.integers(-1, 500),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.01, 1),
    "repetition_penalty": st.floats(0.01, 100),
    "min_new_tokens": st.integers(0, 4),
    "overflow": st.sampled_from(["refuse", "truncate", "slide"]),
    "user": st.text(max_size=5),
    "metadata": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
}
ENDS: dict[str, Any] = {
    "stop": TEXTS.filter(bool) | st.lists(TEXTS.filter(bool), max_size=3),
    "stop_ids": st.lists(st.integers(0, 399), max_size=3),
    "ignore_eos": st.booleans(),
}
FORMS: dict[str, Any] = {
    "regex": st.sampled_from(["[a-z]{1,3}", "a|bc", "(", r"\d+"]),
    "choice": st.lists(TEXTS.filter(bool), min_size=1, max_size=3),
    "grammar": st.sampled_from(['start: "a"', 'start: "x"+', "nonsense"]),
}
SCHEMAS = st.sampled_from(
    [{}, {"type": "object"}, {"enum": [1, "a", None]}, {"type": "wrong"}, {"$ref": "#"}]
)
FORMATS = st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | SCHEMAS.map(
    lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
)
CONTENTS = TEXTS | st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=2)
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "developer", "user", "assistant"]),
        CONTENTS,
    ),
    min_size=1,
    max_size=3,
)
TOOLS = st.sampled_from(["f", "g", "long-name"]).map(
    lambda name: [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}]
)


def merged(*parts: Any) -> Any:
    """One object of several."""
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


def some(fields: dict[str, Any]) -> Any:
    """Any of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


def texts() -> Any:
    """Bodies for completions."""
    own = {
        "best_of": st.integers(1, 3),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 20),
        "suffix": st.just(""),
        "stream_options": st.just({"include_usage": True}),
    }
    prompts = TEXTS | IDS | st.lists(TEXTS, min_size=1, max_size=3) | st.lists(IDS, min_size=1, max_size=3)
    needed = st.fixed_dictionaries({"prompt": prompts, "max_tokens": st.integers(0, 5)})
    formats = some({"response_format": FORMATS})
    return merged(needed, some(SHARED), some(own), some(ENDS) | some(FORMS) | formats)


def talks() -> Any:
    """Bodies for conversations."""
    own = {
        "logprobs": st.just(True),
        "parallel_tool_calls": st.booleans(),
        "modalities": st.just(["text"]),
        "service_tier": st.just("auto"),
    }
    needed = st.fixed_dictionaries({"messages": MESSAGES, "max_completion_tokens": st.integers(1, 5)})
    formats = some({"response_format": FORMATS})
    choices = st.sampled_from(["none", "auto", "required"])
    tools = some({"tools": TOOLS, "tool_choice": choices, "response_format": FORMATS})
    return merged(needed, some(SHARED), some(own), some(ENDS) | some(FORMS) | formats | tools)


def held(server: Running, path: str, body: dict[str, Any], seen: Counter[str]) -> None:
    """Ask; the response must be one of those described, and is counted by its status."""
    response = server.post(path, body)
    status = response.status_code
    note = f"{path} {json.dumps(body)} → {status} {response.text[:500]}"
    assert status == 200 or (status in FAULTS and status < 500), note
    seen[str(status)] += 1
    if status != 200:
        answers.Error.model_validate_json(response.text, strict=True)
    elif body.get("stream"):
        choices = [choice for chunk in chunks_of(response) for choice in chunk["choices"]]
        reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        prompts = body["prompt"] if path == TEXT and isinstance(body["prompt"], list) else [""]
        several = len(prompts) if not isinstance(prompts[0], int) else 1
        assert len(reasons) == several * body.get("n", 1), note
        seen["with tokens"] += 1
    else:
        shape = answers.ChatCompletion if path == CHAT else answers.Completions
        found = shape.model_validate_json(response.text, strict=True)
        seen["with tokens"] += found.usage.completion_tokens > 0


def ask_many(server: Running, count: int) -> Counter[str]:
    """Twice so many requests of bodies that are mostly in order; how they were answered."""
    seen = Counter[str]()

    @many(count)
    @given(body=talks())
    def check_chat(body: dict[str, Any]) -> None:
        held(server, CHAT, body, seen)

    @many(count)
    @given(body=texts())
    def check_text(body: dict[str, Any]) -> None:
        held(server, TEXT, body, seen)

    check_chat()
    check_text()
    assert server.rests(30)
    return seen


def test_bodies_that_are_mostly_in_order(small: Running) -> None:
    seen = ask_many(small, 60)
    assert seen["with tokens"] >= 30, seen


WHOLE = b'{"prompt": "def ", "max_tokens": 2, "logit_bias": {"5": -1.5}, "stop": ["a", "b"], "seed": 7}'


@st.composite
def torn(draw: Any) -> bytes:
    """A body of which a stretch is lost, or is something else."""
    start = draw(st.integers(0, len(WHOLE)))
    end = draw(st.integers(start, min(start + 9, len(WHOLE))))
    other = st.binary(max_size=6) | st.sampled_from(
        [b"NaN", b"[" * 200, b"null", b"\\ud800", b"1e999", b'"a":1,']
    )
    return WHOLE[:start] + draw(other) + WHOLE[end:]


@pytest.mark.slow
def test_bodies_of_any_bytes(small: Running) -> None:
    @many(150)
    @given(body=torn() | st.binary(max_size=40))
    def check(body: bytes) -> None:
        response = small.client.post(TEXT, content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            answers.Error.model_validate_json(response.text, strict=True)

    check()


@pytest.mark.slow
def test_ten_thousand_requests(small: Running) -> None:
    seen = ask_many(small, LONG_OWN)
    generated_statuses = Counter[int]()
    for operation in WITH_BODY:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            generated(small, operation, mode, LONG, generated_statuses)
    total = sum(count for status, count in seen.items() if status.isdigit()) + generated_statuses.total()
    assert total >= 10_000, (seen, generated_statuses)
    assert seen["with tokens"] >= 2_000, seen
    assert small.rests(30)

"""The official client, unchanged, for all that it has of this API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from puna.engine.llm import LLM
from tests.serve.running import MODEL, Running

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

HELLO: Any = [{"role": "user", "content": "Tell me a story"}]
STOP = ["\nUser:"]


@pytest.fixture(scope="module")
def client(story_server: Running) -> Iterator[Any]:
    """Of the small trained model's server; it tries nothing twice."""
    with openai.OpenAI(base_url=f"{story_server.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "puna"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-4")


def test_a_chat_completion(client: Any, stories: LLM) -> None:
    found = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_completion_tokens=20, logprobs=True, top_logprobs=2
    )
    expected = stories.chat(HELLO, template="plain", temperature=0.0, max_new_tokens=20, stop=STOP)
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == 20
    assert found.usage.completion_tokens == 20
    assert found.system_fingerprint == "fp_1"


def test_a_conversation_goes_on_with_the_clients_own_message(client: Any) -> None:
    first = client.chat.completions.create(model=MODEL, messages=HELLO, seed=1, max_tokens=9)
    talk = [*HELLO, first.choices[0].message, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(model=MODEL, messages=talk, seed=1, max_tokens=9)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_streamed_chat_completion(client: Any) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "seed": 3, "max_tokens": 20, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunks[-1].usage == whole.usage


def test_the_clients_own_stream_helper(client: Any) -> None:
    more: Any = {"choice": ["a dog", "a cat"]}  # it wants an answer that is not cut
    with client.chat.completions.stream(model=MODEL, messages=HELLO, seed=3, extra_body=more) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content


class Pet(pydantic.BaseModel):
    """A shape to answer in."""

    kind: Literal["dog", "cat"]
    old: bool


def test_an_answer_in_a_shape(client: Any) -> None:
    found = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Pet, seed=1)
    assert isinstance(found.choices[0].message.parsed, Pet)


def test_completions(client: Any, stories: LLM) -> None:
    found = client.completions.create(
        model=MODEL,
        prompt=["Once upon a time", "The cat"],
        temperature=0,
        max_tokens=8,
        logprobs=1,
        echo=True,
    )
    for choice, prompt in zip(found.choices, ("Once upon a time", "The cat"), strict=True):
        answer = stories.generate(prompt, temperature=0.0, max_new_tokens=8)
        assert choice.text == prompt + answer.text
        assert choice.logprobs.token_logprobs[0] is None
    chunks = client.completions.create(model=MODEL, prompt="Once", temperature=0, max_tokens=8, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == stories.generate("Once", temperature=0.0, max_new_tokens=8).text


def test_fields_of_our_own(client: Any) -> None:
    found = client.completions.create(model=MODEL, prompt="Is it? ", extra_body={"choice": ["yes", "no"]})
    assert found.choices[0].text in ("yes", "no")


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 2") as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"


def test_the_asynchronous_client(story_server: Running, stories: LLM) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{story_server.url}/v1", api_key="none") as client:
            chunks = await client.completions.create(
                model=MODEL, prompt="Once", temperature=0, max_tokens=8, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

    assert asyncio.run(ask()) == stories.generate("Once", temperature=0.0, max_new_tokens=8).text

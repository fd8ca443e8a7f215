"""The same answers over HTTP as from `llm.generate`, whoever else is being answered."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from puna.engine.llm import LLM
from tests.serve.running import Running, chunks_of, running

PATH = "/v1/completions"
WORDS = ["Once upon a time", "The cat", "Lily and Tom", "", "One day, a big dog", "He was sad because"]
MANY = 200


def greedy(number: int) -> dict[str, Any]:
    """One of many requests, of its own prompt and length."""
    prompt = f"{WORDS[number % len(WORDS)]} {number}" if number >= len(WORDS) else WORDS[number]
    return {"prompt": prompt, "temperature": 0, "max_tokens": 6 + number % 9}


async def together(url: str, bodies: list[dict[str, Any]]) -> list[httpx2.Response]:
    """All of them at once, each on a connection of its own."""
    limits = httpx2.Limits(max_connections=len(bodies))
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))


def streamed_text(response: httpx2.Response) -> str:
    """What a stream said."""
    return "".join(chunk["choices"][0]["text"] for chunk in chunks_of(response))


def test_200_at_once_are_the_200_alone(stories: LLM) -> None:
    bodies = [greedy(number) for number in range(MANY)]
    direct = [
        stories.generate(body["prompt"], temperature=0.0, max_new_tokens=body["max_tokens"])
        for body in bodies
    ]
    with running(LLM(stories.model, stories.tokenizer, stories.end_ids)) as server:
        alone = [server.post(PATH, body).json()["choices"][0] for body in bodies]
        times = server.state.llm.engine.times
        steps, sequences = times.steps, times.sequences
        found = [response.json()["choices"][0] for response in asyncio.run(together(server.url, bodies))]
        mean = (times.sequences - sequences) / (times.steps - steps)
    assert found == alone
    assert [(c["text"], c["finish_reason"]) for c in found] == [(a.text, a.finish_reason) for a in direct]
    assert mean >= 16, f"{mean:.1f} sequences were computed together, on average"


def test_mixed_company_changes_no_answer(story_server: Running, stories: LLM) -> None:
    kinds: list[dict[str, Any]] = [
        {"seed": 7},
        {"seed": 8, "n": 3, "top_p": 0.8},
        {"temperature": 0, "logprobs": 3, "echo": True},
        {"seed": 9, "regex": "[a-z]{3,20}"},
        {"temperature": 0, "stop": ["."]},
        {"seed": 1, "stream": True},
    ]
    bodies = [{"prompt": f"{WORDS[n % 3]} {n}", "max_tokens": 24, **kinds[n % len(kinds)]} for n in range(48)]
    alone = [story_server.post(PATH, body) for body in bodies]
    found = asyncio.run(together(story_server.url, bodies))
    for body, one, other in zip(bodies, alone, found, strict=True):
        if "stream" in body:
            whole = stories.generate(body["prompt"], seed=1, max_new_tokens=24)
            assert streamed_text(one) == streamed_text(other) == whole.text
        else:
            assert one.json()["choices"] == other.json()["choices"]

"""An answer has the same bits in any company: chunks of the prompt, shared prefixes, preemption, streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from puna.engine.cache import bytes_per_position
from puna.engine.completion import Completion
from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.kernels.pages import BLOCK
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.quantize.packing import pack
from tests.model.shapes import CONFIGS, model_of

CONTEXT = 400
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = ["grouped", "sliding window", "dynamic", "all at once"]
QUICK = [("sliding window", torch.bfloat16), ("dynamic", torch.float32), ("all at once", torch.float16)]
QUICK_PACKED = [("grouped", torch.bfloat16), ("tied", torch.float32)]
KINDS = [
    pytest.param(
        (shape, dtype, False), marks=() if shape == "grouped" or (shape, dtype) in QUICK else pytest.mark.slow
    )
    for shape in SHAPES
    for dtype in DTYPES
] + [
    pytest.param((shape, dtype, True), marks=() if (shape, dtype) in QUICK_PACKED else pytest.mark.slow)
    for shape in ("grouped", "tied", "all at once")
    for dtype in (torch.float32, torch.bfloat16)
]
ASKED = (
    {"temperature": 0.0},
    {"seed": 1, "temperature": 1.3},
    {"seed": 2, "top_p": 0.9, "top_k": 40},
    {"seed": 3, "presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {5: 2.0}},
    {"seed": 4, "typical_p": 0.8, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.4},
)


def config_of(name: str) -> ModelConfig:
    changes: dict[str, Any] = {"max_position_embeddings": CONTEXT}
    if name == "dynamic":
        changes = {"max_position_embeddings": CONTEXT // 2}  # half of it is past the training length
    if name == "sliding window":
        changes["sliding_window"] = 100
    return CONFIGS[name].model_copy(update=changes)


def requests(vocabulary: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of many lengths, some with long beginnings in common, with every kind of sampling."""
    source = torch.Generator().manual_seed(0)
    shared = torch.randint(vocabulary, (200,), generator=source).tolist()
    lengths = [1, 2, 63, 64, 65, 130, 17, 250]
    prompts = [torch.randint(vocabulary, (length,), generator=source).tolist() for length in lengths]
    prompts += [shared + prompts[0], shared[:150] + prompts[1], shared]
    common = {"max_new_tokens": 12, "logprobs": 3, "ignore_eos": True}
    return [(prompt, {**ASKED[at % len(ASKED)], **common}) for at, prompt in enumerate(prompts)]


def answers(model: Llama, **settings: Any) -> list[Completion]:
    """All requests at once, by an engine of these settings."""
    llm = LLM(model, engine=EngineSettings(**settings))
    return in_order(llm, requests(model.config.vocab_size))


def in_order(llm: LLM, asked: list[tuple[list[int], dict[str, Any]]]) -> list[Completion]:
    return [answer for _, answer in sorted(llm.completions(asked), key=lambda pair: pair[0])]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request: pytest.FixtureRequest) -> Iterator[Llama]:
    shape, dtype, packed = request.param
    model = model_of(config_of(shape), dtype).eval()
    if packed:
        pack(model)
    return model


@pytest.fixture(scope="module")
def alone(model: Llama) -> list[Completion]:
    """Each by an engine of its own, its prompt in one piece."""
    vocabulary = model.config.vocab_size
    return [LLM(model).generate(prompt, **asked) for prompt, asked in requests(vocabulary)]


def test_alone_or_together(model: Llama, alone: list[Completion]) -> None:
    assert answers(model) == alone


@pytest.mark.parametrize("rows", [11, 40, 150])
def test_any_chunks_of_the_prompt(model: Llama, alone: list[Completion], rows: int) -> None:
    assert answers(model, step_tokens=rows, max_running=11) == alone


def test_few_at_a_time(model: Llama, alone: list[Completion]) -> None:
    assert answers(model, max_running=2, step_tokens=64) == alone


def test_with_and_without_a_prefix_that_is_there_already(model: Llama, alone: list[Completion]) -> None:
    llm = LLM(model)
    asked = requests(model.config.vocab_size)
    assert in_order(llm, asked) == alone
    computed = llm.engine.times.rows
    assert in_order(llm, asked) == alone
    assert llm.engine.times.rows - computed < computed / 2
    assert answers(model, prefix_sharing=False) == alone


def test_after_preemption(model: Llama) -> None:
    each = BLOCK * bytes_per_position(model.config, next(model.parameters()).dtype, False)
    asked = [
        ([at] * 40, {**ASKED[at], "max_new_tokens": 100, "logprobs": 1, "ignore_eos": True})
        for at in range(5)
    ]
    free = LLM(model)
    expected = in_order(free, asked)
    llm = LLM(model, engine=EngineSettings(cache_memory=6 * each))
    assert in_order(llm, asked) == expected
    assert (free.engine.load.preemptions, llm.engine.load.preemptions > 0) == (0, True)


def test_streamed_beside_others(model: Llama, alone: list[Completion]) -> None:
    llm = LLM(model)
    prompt, asked = requests(model.config.vocab_size)[5]
    others = llm.completions(requests(model.config.vocab_size))
    next(others)
    stream = llm.stream(prompt, **asked)
    list(stream)
    assert stream.tokens == len(alone[5].tokens)
    rest = dict(others)
    assert rest[5] == alone[5]


def test_log_probabilities_of_the_prompt(model: Llama) -> None:
    asked = [(prompt, {"max_new_tokens": 2, "temperature": 0.0, "prompt_logprobs": 2})
             for prompt, _ in requests(model.config.vocab_size)]  # fmt: skip
    whole = in_order(LLM(model), asked)
    pieces = in_order(LLM(model, engine=EngineSettings(step_tokens=17, max_running=3)), asked)
    assert pieces == whole
    with torch.no_grad():
        for (prompt, _), answer in zip(asked, whole, strict=True):
            ids = torch.tensor([prompt])
            expected = model(ids)[0].double().log_softmax(-1)
            assert answer.prompt_logprobs[0] is None
            for place, found in enumerate(answer.prompt_logprobs[1:], start=1):
                assert found.token == prompt[place]
                if model.config.rope_scaling.rope_type != "dynamic":  # its base is that of the whole length
                    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
                    assert found.logprob == pytest.approx(
                        expected[place - 1, prompt[place]].item(), abs=1e-4 if exact else 0.2
                    )

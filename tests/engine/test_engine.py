"""The engine as a whole: several answers to a prompt, cancelling, faults, overflow, long contexts, memory."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch

from puna.engine.cache import bytes_per_position
from puna.engine.engine import Engine
from puna.engine.llm import LLM, Request
from puna.engine.sampling import SamplingParams
from puna.engine.settings import EngineSettings
from puna.errors import InputError, ModelError, PunaError, ResourceError, SettingsError
from puna.kernels.choosing import _compiled
from puna.kernels.pages import BLOCK
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.settings import parse
from puna.tokenizer.tokenizer import Tokenizer
from tests.engine.conftest import CONTEXT
from tests.model.shapes import CONFIGS, SCALED, ids_of, model_of

PROMPT = [5, 6, 7, 8, 9]


def engine_of(model: Llama, **settings: Any) -> Engine:
    return Engine(model, None, model.config.max_position_embeddings, EngineSettings(**settings))


def drained(engine: Engine) -> None:
    while engine.step():
        pass


def test_n_answers_are_each_as_if_alone_and_share_the_prompt(model: Llama) -> None:
    llm = LLM(model)
    prompt = list(range(80))
    whole = llm.generate(prompt, n=3, seed=4, max_new_tokens=10, ignore_eos=True, logprobs=1)
    answers = [whole, *whole.alternatives]
    assert len({answer.tokens for answer in answers}) == 3
    assert llm.engine.times.rows == 80 + 2 * (80 - BLOCK) + 3 * 9  # the others met the first one's full block
    first = llm.generate(prompt, seed=4, max_new_tokens=10, ignore_eos=True, logprobs=1)
    assert (whole.tokens, whole.logprobs) == (first.tokens, first.logprobs)
    again = LLM(model).generate(prompt, n=3, seed=4, max_new_tokens=10, ignore_eos=True, logprobs=1)
    assert again == whole


def test_best_of_gives_back_the_likeliest(model: Llama) -> None:
    wanted = {"seed": 1, "max_new_tokens": 6, "ignore_eos": True, "logprobs": 0}
    every = LLM(model).generate(PROMPT, n=8, **wanted)
    best = LLM(model).generate(PROMPT, n=2, best_of=8, **wanted)
    score = lambda answer: sum(entry.logprob for entry in answer.logprobs) / len(answer.logprobs)  # noqa: E731
    ranked = sorted([every, *every.alternatives], key=score, reverse=True)
    assert [best.tokens, best.alternatives[0].tokens] == [answer.tokens for answer in ranked[:2]]
    silent = LLM(model).generate(PROMPT, n=2, best_of=8, **{**wanted, "logprobs": None})
    assert silent.logprobs is None
    assert silent.tokens == best.tokens


def test_a_stream_is_of_one_answer(llm: LLM) -> None:
    with pytest.raises(InputError, match="n and best_of must be 1"):
        llm.stream("x", n=2)


def test_a_request_can_be_cancelled_at_any_step(model: Llama) -> None:
    for steps in range(12):
        engine = engine_of(model, max_running=2, step_tokens=8)
        params = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
        answers = [engine.submit(Request(tuple(range(first, first + 20)), params)) for first in range(5)]
        for _ in range(steps):
            engine.step()
        engine.cancel(answers[1])
        drained(engine)
        reasons = [answer.tracks[0].sequence.finish_reason for answer in answers]
        assert reasons[1] == ("cancelled" if steps < 11 else reasons[1])
        assert reasons[:1] + reasons[2:] == ["length"] * 4
        assert (engine.load.running, engine.load.waiting, engine.load.blocks_used) == (0, 0, 0)


def test_a_stream_that_nobody_holds_is_no_longer_computed(llm: LLM) -> None:
    stream = llm.stream("def", max_new_tokens=50, ignore_eos=True)
    next(stream)
    del stream
    assert llm.engine.load.running == 0
    assert llm.engine.load.blocks_used == 0


@pytest.mark.parametrize("place", ["add", "plan"])
def test_a_stream_collected_in_the_middle_of_other_work_is_given_up_after_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    held = [llm.stream("def", max_new_tokens=50, ignore_eos=True)]
    next(held[0])
    work = getattr(llm.engine._scheduler, place)

    def collecting(*arguments: Any) -> Any:
        held.clear()  # as Python may collect what is garbage, at any moment
        return work(*arguments)

    monkeypatch.setattr(llm.engine._scheduler, place, collecting)
    rows = llm.engine.times.rows
    llm.generate([5, 6, 7], max_new_tokens=3, ignore_eos=True)
    assert (llm.engine.load.running, llm.engine.load.blocks_used) == (0, 0)
    assert llm.engine.times.rows - rows <= 3 + 2 + 1


def test_a_stream_gives_the_whole_answer_too(llm: LLM) -> None:
    wanted = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True, "logprobs": 1}
    stream = llm.stream("def", **wanted)
    text = "".join(stream)
    assert stream.completion() == llm.generate("def", **wanted)
    assert stream.completion().text == text
    part = llm.stream("def", **wanted)
    next(part)
    assert part.completion().finish_reason == "cancelled"
    assert text.startswith(part.completion().text)


def test_what_fails_ends_with_its_error_and_harms_no_other(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("def", temperature=0.0, max_new_tokens=8)
    engine = llm.engine
    compute = engine._hidden

    def faulty(parts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if any(part.sequence.prompt[-1] == 7 for part in parts):
            raise RuntimeError("a fault")
        return compute(parts)

    monkeypatch.setattr(engine, "_hidden", faulty)
    with pytest.raises(RuntimeError, match="a fault"):
        llm.generate([5, 7], max_new_tokens=4)
    assert llm.engine is engine
    assert engine.load.blocks_used == 0
    assert llm.generate("def", temperature=0.0, max_new_tokens=8) == expected


def test_logits_that_are_not_finite_end_one_answer(llm: LLM) -> None:
    with torch.no_grad():
        llm.model.model.embed_tokens.weight[9] = torch.nan
    outcomes = dict(
        llm.completions(
            [(PROMPT, {"max_new_tokens": 3}), ([5, 6], {"max_new_tokens": 3, "ignore_eos": True})]
        )
    )
    assert isinstance(outcomes[0], ModelError)
    assert len(outcomes[1].tokens) == 3


def test_requests_at_fault_harm_no_other(llm: LLM) -> None:
    asked = [
        ("def", {"max_new_tokens": 3, "ignore_eos": True}),
        ("def", {"temperature": -1.0}),
        ([], {}),
        ("x" * 500, {}),
        ([{"role": "user", "content": "x"}], {}),
        ("x", {"logit_bias": {4000: 1.0}}),
        ("x", {"stop_ids": (4000,)}),
        ("x", {"typo": 1}),
        "bc",
        ("x",),
        ("def", {"max_new_tokens": 4, "ignore_eos": True}),
    ]
    outcomes = dict(llm.completions(asked))
    assert all(isinstance(outcomes[at], InputError) for at in range(1, len(asked) - 1))
    assert (len(outcomes[0].tokens), len(outcomes[len(asked) - 1].tokens)) == (3, 4)


def test_requests_are_taken_as_fast_as_they_are_answered(model: Llama) -> None:
    taken = []

    def many() -> Any:
        for number in range(10_000):
            taken.append(number)
            yield PROMPT, {"max_new_tokens": 1}

    outcomes = LLM(model, engine=EngineSettings(max_running=4)).completions(many())
    next(outcomes)
    assert len(taken) <= 20


@pytest.mark.parametrize("place", ["_hidden", "add", "done", "finish"])
def test_an_interruption_anywhere_leaves_a_model_that_answers(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = llm.generate("def", temperature=0.0, max_new_tokens=8)
    owner = llm.engine if place == "_hidden" else llm.engine._scheduler
    work = getattr(owner, place)

    def interrupted(*arguments: Any) -> None:
        work(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["def", "x"], temperature=0.0, max_new_tokens=8)
    assert llm.engine.load.running == 0
    assert llm.generate("def", temperature=0.0, max_new_tokens=8) == expected


@pytest.mark.parametrize("fault", [RuntimeError, type("Panic", (BaseException,), {})])
def test_a_fault_of_ours_ends_one_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    from puna.engine.sequence import Sequence

    push = Sequence.push

    def faulty(self: Sequence, *arguments: Any) -> str:
        if self.prompt[-1] == 7:
            raise fault("a fault")
        return push(self, *arguments)

    monkeypatch.setattr(Sequence, "push", faulty)
    wanted = {"max_new_tokens": 3, "ignore_eos": True}
    asked = [([5, 6], wanted), ([5, 7], wanted), ([5, 8], wanted)]
    outcomes = dict(llm.completions(asked))
    assert "a fault" in str(outcomes[1])
    assert type(outcomes[1]) is PunaError
    assert [len(outcomes[at].tokens) for at in (0, 2)] == [3, 3]
    assert (llm.engine.load.running, llm.engine._tracks) == (0, {})


@pytest.mark.parametrize("overflow", ["refuse", "truncate", "slide"])
def test_a_context_of_one_token_has_no_room(config: ModelConfig, overflow: str) -> None:
    tiny = LLM(model_of(config.model_copy(update={"max_position_embeddings": 1})))
    with pytest.raises(InputError, match="one token"):
        tiny.generate([5], overflow=overflow)


def test_several_threads_may_ask_at_once(llm: LLM) -> None:
    wanted = {"seed": 3, "max_new_tokens": 20}
    expected = [llm.generate([5, first], **wanted) for first in range(8)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: llm.generate([5, at], **wanted)}))
        for at in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(8)] == expected


def test_updated_weights_are_used_at_once(llm: LLM) -> None:
    prompt = list(range(70))
    before = llm.generate(prompt, temperature=0.0, max_new_tokens=8)
    with torch.no_grad():
        for parameter in llm.model.parameters():
            parameter.mul_(1.1)
    after = llm.generate(prompt, temperature=0.0, max_new_tokens=8, logprobs=2)
    assert after == LLM(llm.model, llm.tokenizer).generate(
        prompt, temperature=0.0, max_new_tokens=8, logprobs=2
    )
    assert before.tokens != after.tokens
    llm.model.double()
    assert llm.generate(prompt, temperature=0.0, max_new_tokens=8).tokens


# Overflow.


def test_truncating_keeps_the_beginning_token_and_the_newest(llm: LLM, tokenizer: Tokenizer) -> None:
    prompt = [tokenizer.bos_id, *range(10, 10 + 2 * CONTEXT)]
    answer = llm.generate(prompt, overflow="truncate", max_new_tokens=20, ignore_eos=True, temperature=0.0)
    room = CONTEXT - 20 - 1
    assert list(answer.prompt_tokens) == [tokenizer.bos_id, *prompt[-room:]]
    assert answer.dropped == len(prompt) - room - 1
    assert len(answer.tokens) == 20
    short = llm.generate(answer.prompt_tokens, max_new_tokens=20, ignore_eos=True, temperature=0.0)
    assert short.tokens == answer.tokens
    whole = llm.generate(PROMPT, overflow="truncate", max_new_tokens=5)
    assert (list(whole.prompt_tokens), whole.dropped) == (PROMPT, 0)


def test_sliding_goes_on_past_the_context_as_from_the_newest_half(model: Llama) -> None:
    llm = LLM(model)
    answer = llm.generate(
        PROMPT, overflow="slide", max_new_tokens=3 * CONTEXT, temperature=0.0, ignore_eos=True
    )
    assert len(answer.tokens) == 3 * CONTEXT
    ids = list(PROMPT)
    for token in answer.tokens:
        if len(ids) > CONTEXT:
            ids = ids[-(CONTEXT // 2) :]
        with torch.no_grad():
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    crowd = dict(
        llm.completions(
            [(PROMPT, {"overflow": "slide", "max_new_tokens": 250, "ignore_eos": True, "temperature": 0.0})]
            + [([at], {"seed": at, "max_new_tokens": 40}) for at in range(20)]
        )
    )
    assert crowd[0].tokens == answer.tokens[:250]


def test_refusing_names_the_choice(llm: LLM) -> None:
    with pytest.raises(InputError, match="shorten it, or let overflow be"):
        llm.generate([5] * CONTEXT)
    with pytest.raises(SettingsError, match="overflow"):
        llm.generate("x", overflow="wrap")


@pytest.mark.parametrize("name", SCALED)
def test_long_contexts_with_every_scaling_equal_transformers(name: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from puna import formats
    from puna.model.weights import weights_of

    # Trained at 64; the answers end near 300.
    scaling = CONFIGS[name].rope_scaling
    original = {"original_max_position_embeddings": 64} if name != "linear" and name != "dynamic" else {}
    config = CONFIGS[name].model_copy(
        update={
            "max_position_embeddings": 64 if name == "dynamic" else 320,
            "rope_scaling": scaling.model_copy(
                update={**original, **({"factor": 5.0} if name == "dynamic" else {})}
            ),
        }
    )
    model = model_of(config)
    formats.save(tmp_path / "model", weights_of(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompt = ids_of(config, 1, 200)[0].tolist()
    answer = LLM(model).generate(prompt, max_new_tokens=100, temperature=0.0, ignore_eos=True, logprobs=0)
    assert len(answer.tokens) == 100
    ids = torch.tensor([[*prompt, *answer.tokens]])
    with torch.no_grad():
        expected = theirs(ids).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
    if name == "dynamic":  # theirs takes the base of the 300 it is given, which is the length ours may reach
        assert LLM(model).context == 320
    for row, entry in enumerate(answer.logprobs):
        assert entry.logprob == pytest.approx(expected[row, entry.token].item(), abs=2e-4)


def test_all_is_compiled_when_an_engine_is_made(model: Llama) -> None:
    """Not at the first token, which somebody waits for."""
    _compiled.cache_clear()
    engine_of(model)
    assert _compiled.cache_info().currsize == 1


# Memory.


def test_too_little_memory_for_one_sequence_is_said_at_start(model: Llama) -> None:
    each = BLOCK * bytes_per_position(model.config, torch.float32, False)
    llm = LLM(model, engine=EngineSettings(cache_memory=each + 1))
    assert llm.generate(PROMPT, max_new_tokens=BLOCK - 5).tokens
    with pytest.raises(ResourceError, match=rf"{BLOCK} positions") as caught:
        llm.generate(PROMPT, max_new_tokens=BLOCK + 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ResourceError, match="cache_memory"):
        LLM(model, engine=EngineSettings(cache_memory=each - 1)).generate(PROMPT)


def test_int8_keys_and_values_take_less_and_change_little(model: Llama) -> None:
    plain = bytes_per_position(model.config, torch.float32, False)
    assert bytes_per_position(model.config, torch.float32, True) < plain / 2
    wanted = {"temperature": 0.0, "max_new_tokens": 30, "ignore_eos": True, "logprobs": 0}
    exact = LLM(model).generate(PROMPT, **wanted)
    small = LLM(model, engine=EngineSettings(cache_dtype="int8")).generate(PROMPT, **wanted)
    gaps = [abs(a.logprob - b.logprob) for a, b in zip(exact.logprobs, small.logprobs, strict=True)]
    assert 0 < max(gaps[:5]) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_memory": 0}, "cache_memory"),
        ({"step_tokens": 8, "max_running": 9}, "every running sequence has a row"),
        ({"cache_dtype": "int4"}, "cache_dtype"),
        ({"step_token": 8}, "Did you mean 'step_tokens'"),
    ],
)
def test_impossible_engine_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse(EngineSettings, settings, "engine")
    assert "\n" not in str(caught.value)


def test_constrained_answers_beside_free_ones(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    asked = [("x", {"json_schema": schema, "seed": at, "max_new_tokens": 60}) for at in range(6)]
    free = [("x", {"seed": at, "max_new_tokens": 20}) for at in range(6)]
    together = dict(llm.completions([pair for both in zip(asked, free, strict=True) for pair in both]))
    for at in range(6):
        answer = together[2 * at]
        assert answer == llm.generate("x", **asked[at][1])
        if answer.finish_reason == "stop":
            assert list(json.loads(answer.text)) == ["a"]
        assert together[2 * at + 1] == llm.generate("x", **free[at][1])
    assert {together[2 * at].finish_reason for at in range(6)} <= {"stop", "length"}
    with pytest.raises(InputError, match="tokenizer"):
        LLM(llm.model).generate(PROMPT, regex="a+")

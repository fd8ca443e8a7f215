"""Every rule on its distribution; the draw by chi-square; a row's choice is its own affair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine import sampling
from puna.engine.sampling import ORDER, Sampler, SamplingParams, TokenLogprobs, draw, logprobs
from puna.errors import ModelError, SettingsError
from puna.settings import parse

CPU = torch.device("cpu")
NONE_SEEN = torch.zeros(1, 5, dtype=torch.bool)


def distribution(rule: str, probabilities: list[float], setting: float, seen: list[int] = ()) -> list[float]:
    """What a rule makes of a distribution."""
    logits = torch.tensor([probabilities], dtype=torch.float64).log()
    held = torch.zeros(1, len(probabilities), dtype=torch.bool)
    held[0, list(seen)] = True
    return ORDER[rule].apply(logits, torch.tensor([setting]), held).softmax(-1)[0].tolist()


def near(values: list[float]) -> object:
    return pytest.approx(values, abs=1e-6)


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    raised = [p**2 for p in (0.5, 0.3, 0.2)]
    assert distribution("temperature", [0.5, 0.3, 0.2], 0.5) == near([p / sum(raised) for p in raised])


def test_a_tiny_temperature_is_not_infinite() -> None:
    logits = torch.tensor([[100.0, 99.0, -50.0]])
    shaped = ORDER["temperature"].apply(logits, torch.tensor([1e-38]), NONE_SEEN)
    assert shaped.softmax(-1)[0].tolist() == [1.0, 0.0, 0.0]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert distribution("top_k", [0.1, 0.4, 0.2, 0.3], 2) == near([0, 4 / 7, 0, 3 / 7])
    assert distribution("top_k", [0.1, 0.4, 0.2, 0.3], 9) == near([0.1, 0.4, 0.2, 0.3])


def test_top_k_keeps_what_equals_the_last() -> None:
    assert distribution("top_k", [0.2, 0.4, 0.2, 0.2], 2) == near([0.2, 0.4, 0.2, 0.2])


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.05, [0, 1, 0, 0]),
        (0.5, [0, 1, 0, 0]),
        (0.51, [0, 2 / 3, 0, 1 / 3]),
        (0.75, [0, 2 / 3, 0, 1 / 3]),
        (0.76, [0, 8 / 15, 3 / 15, 4 / 15]),
        (0.999, [1 / 16, 8 / 16, 3 / 16, 4 / 16]),
    ],
)
def test_top_p_keeps_as_few_as_reach_p(p: float, expected: list[float]) -> None:
    assert distribution("top_p", [1 / 16, 8 / 16, 3 / 16, 4 / 16], p) == near(expected)


def test_top_p_keeps_what_equals_the_last() -> None:
    assert distribution("top_p", [0.25, 0.25, 0.25, 0.25], 0.3) == near([0.25] * 4)


def test_top_p_of_a_flat_distribution_looks_beyond_the_head() -> None:
    V = 4 * sampling.HEAD
    # Twice as likely at even ids, so that 2/3 lies exactly with them, far more than the head holds.
    logits = torch.zeros(2, V, dtype=torch.float64)
    logits[0, ::2] = math.log(2)
    logits[1, 7] = 9.0  # e^9 : 4095, needs the head only
    shaped = ORDER["top_p"].apply(logits, torch.tensor([0.66, 0.5]), NONE_SEEN)
    assert torch.equal(shaped[0] > -torch.inf, torch.arange(V) % 2 == 0)
    assert (shaped[1] > -torch.inf).nonzero().tolist() == [[7]]


def test_min_p_keeps_a_share_of_the_likeliest() -> None:
    assert distribution("min_p", [0.1, 0.4, 0.19, 0.31], 0.5) == near([0, 0.4 / 0.71, 0, 0.31 / 0.71])


def test_repetition_penalty_divides_or_multiplies_logits_of_seen_tokens() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert sampling.repetition_penalty(logits, torch.tensor([2.0]), seen).tolist() == [[1, -4, 3, -3, 0]]


@pytest.mark.parametrize("name", ORDER)
def test_a_neutral_row_stays_as_it_is_beside_one_that_changes(name: str) -> None:
    strong = {"repetition_penalty": 3.0, "temperature": 0.3, "top_k": 2, "top_p": 0.2, "min_p": 0.9}
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    setting = torch.tensor([ORDER[name].neutral, strong[name]])
    shaped = ORDER[name].apply(logits, setting, torch.ones(2, 50, dtype=torch.bool))
    assert torch.allclose(shaped[0].softmax(-1), logits[0].softmax(-1), atol=1e-7)
    assert not torch.allclose(shaped[1].softmax(-1), logits[1].softmax(-1), atol=1e-2)


def test_the_rules_in_order_equal_those_of_transformers() -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    logits = 3 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    prompts = torch.randint(200, (4, 6), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(4, 200, dtype=torch.bool).scatter(1, prompts, True)

    ours = logits
    for name, rule in ORDER.items():
        ours = rule.apply(ours, torch.full((4,), getattr(params, name)), seen)
    theirs = logits
    for warper in (
        warpers.RepetitionPenaltyLogitsProcessor(1.3),
        warpers.TemperatureLogitsWarper(0.7),
        warpers.TopKLogitsWarper(40),
        warpers.TopPLogitsWarper(0.9),
        warpers.MinPLogitsWarper(0.02),
    ):
        theirs = warper(prompts, theirs)

    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-6)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.02, 0.5, 0.08, 0.25, 0.15], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([draw(probabilities.log().float(), generator) for _ in range(20_000)])
    counts = tokens.bincount(minlength=5).double()
    assert chi_square(counts, probabilities) < 18.47  # 99.9% of draws from this distribution, 4 degrees
    assert chi_square(counts, torch.full((5,), 0.2, dtype=torch.float64)) > 1000


def test_whole_sampling_follows_its_distribution() -> None:
    params = [SamplingParams(temperature=2.0, top_k=3, seed=seed) for seed in range(4000)]
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    tokens = Sampler(params, [[0]] * 4000, 5, CPU).sample(logits.expand(4000, -1))
    expected = (logits[:3] / 2).softmax(-1).double()
    counts = torch.tensor(tokens).bincount(minlength=5).double()
    assert counts[3:].sum() == 0
    assert chi_square(counts[:3], expected) < 13.8  # 99.9%, 2 degrees


class _Constant(torch.Generator):
    """Stands where a generator is asked for; `torch.rand` is replaced beside it."""


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1 - 2**-53, 3)]
)
def test_tokens_without_probability_are_never_drawn(
    uniform: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(uniform, dtype=torch.float64))
    logits = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log()
    assert draw(logits, _Constant()) == token


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0, 7.0, -1.0]])
    for others in (
        {},
        {"top_k": 1},
        {"top_k": 2, "top_p": 0.01, "min_p": 1.0, "seed": 3},
        {"top_p": 0.5, "logprobs": 2},
    ):
        params = SamplingParams(temperature=0, **others)
        assert Sampler([params], [[0]], 5, CPU).sample(logits) == [1]


def test_greedy_respects_the_repetition_penalty() -> None:
    sampler = Sampler([SamplingParams(temperature=0.0, repetition_penalty=2.0)], [[3]], 5, CPU)
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0]])
    assert [sampler.sample(logits)[0] for _ in range(3)] == [2, 1, 3]  # 3 halved by the prompt, then 2, 1


def choices(params: list[SamplingParams], steps: int = 12) -> list[list[int]]:
    """Tokens of every row over some steps; a row's logits depend on its seed alone."""
    V = 64
    sampler = Sampler(params, [[row.seed % V] for row in params], V, CPU)
    taken: list[list[int]] = [[] for _ in params]
    for step in range(steps):
        rows = [
            torch.randn(V, generator=torch.Generator().manual_seed(1000 * row.seed + step)) for row in params
        ]
        for row, token in enumerate(sampler.sample(torch.stack(rows))):
            taken[row].append(token)
    return taken


row_settings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    seed=st.integers(0, 50),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(row_settings, min_size=1, max_size=5))
def test_a_row_chooses_the_same_alone_and_in_company(params: list[SamplingParams]) -> None:
    assert choices(params) == [choices([row])[0] for row in params]


def test_rows_that_stay_go_on_as_if_the_others_had(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(seed=seed, repetition_penalty=1.2) for seed in (5, 6, 7)]
    logits = torch.randn(20, 3, 64, generator=torch.Generator().manual_seed(0))
    whole, parted = (Sampler(params, [[1], [2], [3]], 64, CPU) for _ in range(2))
    expected = [whole.sample(logits[step]) for step in range(20)]
    for step in range(10):
        parted.sample(logits[step])
    parted.keep([2, 0])
    assert [parted.sample(logits[step][[2, 0]]) for step in range(10, 20)] == [
        [row[2], row[0]] for row in expected[10:]
    ]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    choices([SamplingParams(seed=1)])
    Sampler([SamplingParams()], [[0]], 8, CPU).sample(torch.zeros(1, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_answers_differ() -> None:
    flat = torch.zeros(2, 50_000)
    first, second = Sampler([SamplingParams()] * 2, [[0], [0]], 50_000, CPU).sample(flat)
    assert first != second


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told(value: float) -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2] = value
    with pytest.raises(ModelError, match="not finite"):
        Sampler([SamplingParams()], [[0]], 5, CPU).sample(logits)


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    found = logprobs(logits, [0, 0], [2, 0])
    values = logits.double().log_softmax(-1)
    assert found[0].logprob == pytest.approx(values[0, 0].item(), abs=1e-6)
    assert [token for token, _ in found[0].top] == [2, 1]
    assert [value for _, value in found[0].top] == pytest.approx(values[0, [2, 1]].tolist(), abs=1e-6)
    assert found[1] == TokenLogprobs(0, pytest.approx(values[1, 0].item(), abs=1e-6), ())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse(SamplingParams, setting, "sampling")
    assert "\n" not in str(caught.value)


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")

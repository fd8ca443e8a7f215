"""Every rule on its distribution; the draw by chi-square; a row's choice is its own affair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine import draw, rules, sampling
from puna.engine.sampling import ORDER, SamplingParams, SamplingState, TokenLogprobs, choose, logprobs
from puna.engine.state import Choice
from puna.errors import ModelError, SettingsError
from puna.kernels.library import load
from puna.settings import parse

needs_compiler = pytest.mark.skipif(load("choosing").functions is None, reason=load("choosing").fault)


@pytest.fixture(
    scope="module", autouse=True, params=[pytest.param("compiled", marks=needs_compiler), "plain"]
)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything holds for the compiled kernel and for plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(sampling, "chooser_on", lambda device: None)
        yield request.param


class Allowing:
    """Stands for a constraint: the same ids are allowed at every place."""

    complete = False

    def __init__(self, V: int, ids: Sequence[int]) -> None:
        self._mask = torch.zeros(V, dtype=torch.bool)
        self._mask[list(ids)] = True

    def allowed(self) -> torch.Tensor:
        return self._mask

    def accept(self, token: int) -> None:
        assert self._mask[token]


def state_of(
    *, prompt: Sequence[int] = (0,), answer: Sequence[int] = (), ends: Sequence[int] = (), index: int = 0,
    constraint: Any = None, **params: Any,
) -> SamplingState:  # fmt: skip
    """The state of an answer that has these tokens already."""
    state = SamplingState(SamplingParams(**params), prompt, ends, index, constraint)
    for token in answer:
        state.note(Choice(token))
    return state


def edited(name: str, logits: list[float], **state: Any) -> list[float]:
    """What a rule for single ids makes of logits."""
    values = torch.tensor([logits, logits], dtype=torch.float64)
    rule = ORDER[name]
    assert isinstance(rule, rules.Edit)
    assert rule.asked(state_of(**state))
    rule.apply(values, torch.tensor([1]), [state_of(**state)])
    assert values[0].tolist() == logits
    return values[1].tolist()


def kept(probabilities: Sequence[float], **params: Any) -> list[float]:
    """What is left of a distribution, as the shares of a fine comb of uniform numbers."""
    steps = 1000
    states = [state_of(**params) for _ in range(steps)]
    for step, state in enumerate(states):
        state.uniform = (step + 0.5) / steps
    logits = torch.tensor(probabilities, dtype=torch.float64).log().float().expand(steps, -1)
    tokens = torch.tensor([choice.token for choice in choose(logits, states)])
    return (tokens.bincount(minlength=len(probabilities)) / steps).tolist()


def near(values: Sequence[float]) -> object:
    return pytest.approx(values, abs=1.1e-3)


def test_the_order_is_transformers() -> None:
    assert list(ORDER) == [
        "constraint",
        "min_new_tokens",
        "logit_bias",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
    ]


def test_a_constraint_forbids_the_rest() -> None:
    found = edited("constraint", [1.0, -2.0, 0.5], constraint=Allowing(3, [1]))
    assert found == [-math.inf, -2, -math.inf]


def test_ends_are_forbidden_until_the_least_length() -> None:
    state = {"stop_ids": (1,), "ends": (2, 99), "min_new_tokens": 2}
    assert edited("min_new_tokens", [1, 2, 3, 4], **state) == [1, -math.inf, -math.inf, 4]
    assert edited("min_new_tokens", [1, 2, 3, 4], **state, ignore_eos=True) == [1, -math.inf, 3, 4]
    assert edited("min_new_tokens", [1, 2, 3, 4], **state, answer=[0]) == [1, -math.inf, -math.inf, 4]
    assert not ORDER["min_new_tokens"].asked(state_of(**state, answer=[0, 0]))


def test_ends_stay_where_a_constraint_leaves_nothing_else() -> None:
    only = Allowing(4, [2])
    state = state_of(ends=(2,), min_new_tokens=5, temperature=0, constraint=only)
    assert choose(torch.zeros(1, 4), [state]) == [Choice(2)]
    other = state_of(ends=(2,), min_new_tokens=5, temperature=0, constraint=Allowing(4, [2, 3]))
    assert choose(torch.zeros(1, 4), [other]) == [Choice(3)]


def test_bias_is_added() -> None:
    found = edited("logit_bias", [1.0, 2.0, 3.0], logit_bias={"2": -100, 0: 0.5})
    assert found == [1.5, 2, -97]


def test_repetition_penalty_divides_or_multiplies_logits_of_seen_tokens() -> None:
    found = edited(
        "repetition_penalty", [2, -2, 3, -3, 0], prompt=[0, 1, 0], answer=[4, 4], repetition_penalty=2.0
    )
    assert found == [1, -4, 3, -3, 0]


def test_presence_and_frequency_are_counted_in_the_answer_alone() -> None:
    state = {"prompt": [2, 2], "answer": [0, 1, 0, 0]}
    assert edited("presence_penalty", [5, 5, 5], **state, presence_penalty=0.5) == [4.5, 4.5, 5]
    assert edited("frequency_penalty", [5, 5, 5], **state, frequency_penalty=-0.5) == [6.5, 5.5, 5]


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    raised = [p**2 for p in (0.5, 0.3, 0.2)]
    assert kept([0.5, 0.3, 0.2], temperature=0.5) == near([p / sum(raised) for p in raised])


@pytest.mark.parametrize("value", [1e-300, 1e-45, 1e-38, 1e-10])
def test_a_tiny_temperature_is_not_infinite(value: float) -> None:
    logits = torch.tensor([[99.0, 100.0, -50.0, -math.inf]])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        state = state_of(temperature=value)
        state.uniform = uniform
        assert choose(logits, [state]) == [Choice(1)]


def test_a_huge_temperature_leaves_the_impossible_impossible() -> None:
    assert kept([0.9, 0.0, 0.1], temperature=1e300) == near([0.5, 0, 0.5])


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2) == near([0, 4 / 7, 0, 3 / 7])
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=9) == near([0.1, 0.4, 0.2, 0.3])
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=10**30) == near([0.1, 0.4, 0.2, 0.3])


def test_top_k_keeps_what_equals_the_last() -> None:
    assert kept([0.2, 0.4, 0.2, 0.2], top_k=2) == near([0.2, 0.4, 0.2, 0.2])


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.05, [0, 1, 0, 0]),
        (0.49, [0, 1, 0, 0]),
        (0.51, [0, 2 / 3, 0, 1 / 3]),
        (0.74, [0, 2 / 3, 0, 1 / 3]),
        (0.76, [0, 8 / 15, 3 / 15, 4 / 15]),
        (0.95, [1 / 16, 8 / 16, 3 / 16, 4 / 16]),
    ],
)
def test_top_p_keeps_as_few_as_reach_it(p: float, expected: list[float]) -> None:
    assert kept([1 / 16, 8 / 16, 3 / 16, 4 / 16], top_p=p) == near(expected)


def test_top_p_counts_what_top_k_left() -> None:
    # 8/12 of what top_k keeps is the first; of everything it would be 8/16, and two would be needed.
    assert kept([1 / 16, 8 / 16, 3 / 16, 4 / 16], top_k=2, top_p=0.6) == near([0, 1, 0, 0])


def test_top_p_past_the_head_keeps_what_it_must() -> None:
    V = 4 * draw.BLOCK * draw.HEAD
    # Twice as likely at even ids, so that 2/3 lies exactly with them, far more than the head holds.
    logits = torch.zeros(2, V)
    logits[0, ::2] = math.log(2)
    logits[1, 7] = 12.0
    states = [state_of(top_p=0.66), state_of(top_p=0.5)]
    even = set()
    for step in range(10):
        for state in states:
            state.uniform = (step + 0.5) / 10
        first, second = (choice.token for choice in choose(logits, states))
        even.add(first)
        assert second == 7
    assert len(even) == 10
    assert all(token % 2 == 0 for token in even)
    assert max(even) > V * 0.9
    assert min(even) < V * 0.1


def test_min_p_keeps_a_share_of_the_likeliest() -> None:
    assert kept([0.1, 0.4, 0.19, 0.31], min_p=0.5) == near([0, 0.4 / 0.71, 0, 0.31 / 0.71])
    assert kept([0.1, 0.4, 0.1, 0.4], min_p=1.0) == near([0, 0.5, 0, 0.5])


def test_typical_p_keeps_what_is_as_surprising_as_expected() -> None:
    # Entropy 1.19 nats; surprises 0.51, 1.61, 2.3, 2.3: distances 0.58, 0.52, 1.2, 1.2.
    probabilities = [0.1, 0.6, 0.1, 0.2]
    assert kept(probabilities, typical_p=0.1) == near([0, 0, 0, 1])
    assert kept(probabilities, typical_p=0.3) == near([0, 0.75, 0, 0.25])
    assert kept(probabilities, typical_p=0.9) == near([0.1, 0.6, 0.1, 0.2])


def left_by_transformers(params: SamplingParams, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The distributions (B, V) that transformers leaves; penalties of counts by OpenAI's formula."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    answer = ids[:, 4:]
    logits = warpers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits)
    counts = torch.zeros_like(logits).scatter_add(1, answer, torch.ones(answer.shape))
    logits = logits - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    for warper in (
        warpers.TemperatureLogitsWarper(params.temperature),
        warpers.TopKLogitsWarper(params.top_k),
        warpers.TopPLogitsWarper(params.top_p),
        warpers.MinPLogitsWarper(params.min_p),
        warpers.TypicalLogitsWarper(params.typical_p),
    ):
        logits = warper(ids, logits)
    return logits.double().softmax(-1)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
        {"temperature": 1.5, "top_k": 3000, "top_p": 0.97, "min_p": 0.0001, "typical_p": 0.99},
        {"temperature": 1.1, "top_k": 150, "top_p": 0.999, "min_p": 0.01, "typical_p": 0.5},
    ],
)
def test_all_rules_in_order_leave_what_those_of_transformers_do(params: dict[str, Any]) -> None:
    params |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    V, B, steps = 3001, 3, 40
    logits = 3 * torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(V, (B, 10), generator=torch.Generator().manual_seed(1))
    ids[:, 6] = ids[:, 5]
    expected = left_by_transformers(SamplingParams(**params), logits, ids).cumsum(-1)  # (B, V)
    states = [
        state_of(prompt=row[:4], answer=row[4:], **params) for row in ids.tolist() for _ in range(steps)
    ]
    for number, state in enumerate(states):
        state.uniform = (number % steps + 0.5) / steps
    found = choose(logits.repeat_interleave(steps, 0), states)
    for number, (choice, state) in enumerate(zip(found, states, strict=True)):
        row = expected[number // steps]
        before = row[choice.token - 1].item() if choice.token else 0.0
        assert before - 1e-5 <= state.uniform <= row[choice.token].item() + 1e-5
        assert row[choice.token].item() > before  # what theirs forbid is never drawn


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


def tokens_drawn(logits: torch.Tensor, count: int, **params: Any) -> torch.Tensor:
    """Tokens of one long answer whose logits never change: its own random numbers, one after the other."""
    state = state_of(**params)
    found = []
    for _ in range(count):
        found.append(choose(logits[None], [state])[0])
        state.note(found[-1])
    return torch.tensor([choice.token for choice in found])


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.02, 0.5, 0.08, 0.25, 0.15], dtype=torch.float64)
    counts = tokens_drawn(probabilities.log().float(), 1500, seed=1).bincount(minlength=5).double()
    assert chi_square(counts, probabilities) < 18.47  # 99.9% of draws from this distribution, 4 degrees
    assert chi_square(counts, torch.full((5,), 0.2, dtype=torch.float64)) > 100


def test_first_draws_of_many_seeds_follow_the_distribution() -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    for index in (0, 1):
        states = [state_of(temperature=2.0, top_k=3, seed=seed, index=index) for seed in range(4000)]
        tokens = torch.tensor([choice.token for choice in choose(logits.expand(4000, -1), states)])
        counts = tokens.bincount(minlength=5).double()
        assert counts[3:].sum() == 0
        assert chi_square(counts[:3], (logits[:3] / 2).softmax(-1).double()) < 13.8  # 99.9%, 2 degrees


def test_draws_over_many_blocks_follow_the_distribution() -> None:
    V, steps = 500, 8_000
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).tolist()
    states = [state_of() for _ in range(steps)]
    for state, number in zip(states, uniform, strict=True):
        state.uniform = number
    tokens = torch.tensor([choice.token for choice in choose(logits.expand(steps, -1), states)])
    probabilities = logits.double().softmax(-1)
    common = probabilities > 5 / steps
    counts = tokens.bincount(minlength=V).double()
    degrees = int(common.sum())
    assert degrees > 100
    grouped = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([probabilities[common], probabilities[~common].sum()[None]])
    assert chi_square(grouped, expected) < degrees + 3.3 * math.sqrt(2 * degrees)


def first_uniform(logits: torch.Tensor, token: int) -> float:
    """The least uniform number that draws this token or a later one."""
    state, low, high = state_of(), 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        state.uniform = middle
        (choice,) = choose(logits, [state])
        low, high = (low, middle) if choice.token >= token else (middle, high)
    return high


@pytest.mark.parametrize("rare", [1e-6, 1e-9, 1e-12])
def test_rare_tokens_keep_their_share(rare: float) -> None:
    """Float32 sums from the first token on would lose them all beside one likely token."""
    V = 1000
    logits = torch.full((1, V), math.log(rare))
    logits[0, 0] = math.log(1 - (V - 1) * rare)
    for token in (1, 63, 64, V - 2):
        share = first_uniform(logits, token + 1) - first_uniform(logits, token)
        assert share == pytest.approx(rare, rel=2e-4 if rare < 1e-11 else 2e-5)


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.9999, 3), (1 - 2**-53, 3)]
)
@pytest.mark.parametrize("params", [{}, {"top_p": 0.99}, {"min_p": 0.01}, {"typical_p": 0.999}])
def test_tokens_without_probability_are_never_drawn(
    uniform: float, token: int, params: dict[str, Any]
) -> None:
    logits = torch.full((1, 700), -math.inf)
    logits[0, :5] = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log()
    for spread in (1, 100):
        state = state_of(**params)
        state.uniform = uniform
        wide = torch.full((1, 700), -math.inf)
        wide[0, : 5 * spread : spread] = logits[0, :5]
        assert choose(wide, [state]) == [Choice(token * spread)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1, exclude_max=True), st.integers(1, 300))
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(seed: int, uniform: float, V: int) -> None:
    logits = 5 * torch.randn(V, generator=torch.Generator().manual_seed(seed))
    state = state_of()
    state.uniform = uniform
    (choice,) = choose(logits[None], [state])
    reached = logits.double().softmax(-1).cumsum(-1)
    assert reached[choice.token] >= uniform - 1e-5
    assert choice.token == 0 or reached[choice.token - 1] <= uniform + 1e-5


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    logits = torch.full((1, 5 * draw.BLOCK + 3), -1.0)
    logits[0, [70, 71, 200, 322]] = 7.0
    for others in (
        {},
        {"top_k": 1},
        {"top_k": 2, "top_p": 0.01, "min_p": 1.0, "seed": 3},
        {"top_p": 0.5, "logprobs": 2},
        {"typical_p": 0.1, "n": 2},
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            (choice,) = choose(logits.to(dtype), [state_of(temperature=0, **others)])
            assert choice.token == 70


def test_greedy_respects_penalties() -> None:
    state = state_of(prompt=[3], temperature=0.0, repetition_penalty=2.0)
    logits, found = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0]]), []
    for _ in range(3):
        found.append(choose(logits, [state])[0])
        state.note(found[-1])
    assert [choice.token for choice in found] == [2, 1, 3]  # 3 halved by the prompt, then 2, 1
    assert logits.tolist() == [[1, 2, 3, 4, 0]]


row_settings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 0, 1, 5, 100, 2000]),
        "top_p": st.sampled_from([0.3, 0.9, 0.999, 1.0, 1.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.2, 0.0001]),
        "typical_p": st.sampled_from([1.0, 1.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "presence_penalty": st.sampled_from([0.0, 0.3]),
        "frequency_penalty": st.sampled_from([0.0, -0.3]),
        "logit_bias": st.sampled_from([{}, {3: 2.0}]),
        "min_new_tokens": st.sampled_from([0, 20]),
        "logprobs": st.sampled_from([None, 0, 3, 20]),
        "seed": st.integers(0, 50),
    }
)
WIDTHS = (5, 64, 700, 2500, 9000)


def row_of(params: dict[str, Any], V: int, dtype: torch.dtype) -> tuple[torch.Tensor, SamplingState]:
    """Logits and state that depend on the seed alone."""
    seed = params["seed"]
    logits = 3 * torch.randn(V, generator=torch.Generator().manual_seed(seed))
    limit = Allowing(V, range(seed % 5, V, 3)) if seed % 4 == 0 else None
    state = state_of(prompt=[0, 1], answer=[seed % V % 5, 3, 3], ends=[2], constraint=limit, **params)
    return logits.to(dtype), state


@settings(max_examples=40, deadline=None)
@given(
    st.lists(row_settings, min_size=2, max_size=6),
    st.sampled_from(WIDTHS),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_chooses_the_same_alone_and_in_company(
    params: list[dict[str, Any]], V: int, dtype: torch.dtype
) -> None:
    rows = [row_of(row, V, dtype) for row in params]
    together = choose(torch.stack([logits for logits, _ in rows]), [state for _, state in rows])
    assert together == [choose(logits[None], [state])[0] for logits, state in rows]


@pytest.mark.parametrize("V", [333, 33_001])
def test_every_number_on_the_way_is_the_same_alone_and_in_any_batch(
    V: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the token: the sums it is drawn from, to the last bit, for each way of drawing."""
    if path == "compiled":
        pytest.skip("the kernel's are compared in tests/kernels/test_choosing.py")
    seen: list[list[torch.Tensor]] = []
    hit = draw._hit
    monkeypatch.setattr(draw, "_hit", lambda *given: seen.append(list(given)) or hit(*given))
    logits = 3 * torch.randn(64, V, generator=torch.Generator().manual_seed(0))
    for params in ({}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.05}):
        states = [state_of(seed=seed, temperature=0.8, logprobs=3, **params) for seed in range(64)]
        seen.clear()
        whole = choose(logits, states)
        sums, chosen = (step[0] for step in seen)
        for B in (1, 2, 3, 16, 33):
            seen.clear()
            assert choose(logits[:B], states[:B]) == whole[:B]
            assert torch.equal(seen[1][0], chosen[:B])
            nonzero = [row[row > 0] for row in seen[0][0]]  # how many empty blocks stand between is no matter
            assert all(torch.equal(row, sums[i][sums[i] > 0]) for i, row in enumerate(nonzero))


def test_a_row_without_finite_logits_fails_alone() -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = -math.inf  # impossible, which is no fault
    states = [state_of(seed=seed, logprobs=1) for seed in range(5)]
    expected = choose(logits, states)
    for fault in (math.nan, math.inf):
        broken = logits.clone()
        broken[1, 30], broken[3, 699] = fault, fault
        found = choose(broken, states)
        assert [found[row] for row in (0, 2, 4)] == [expected[row] for row in (0, 2, 4)]
        for row in (1, 3):
            assert isinstance(found[row], ModelError)
            assert "not finite" in str(found[row])
    assert all(isinstance(row, ModelError) for row in choose(torch.full((2, 9), math.nan), states[:2]))
    assert isinstance(choose(torch.full((1, 9), -math.inf), states[:1])[0], ModelError)


def test_not_finite_behind_a_constraint_is_told_all_the_same() -> None:
    state = state_of(constraint=Allowing(3, [0]))
    assert isinstance(choose(torch.tensor([[0.0, math.nan, 0.0]]), [state])[0], ModelError)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_may_choose_nothing_fails_alone(temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[0, 2] = -math.inf
    stuck = state_of(temperature=temperature, constraint=Allowing(5, [2]))
    failed, fine = choose(logits, [stuck, state_of(temperature=0)])
    assert isinstance(failed, ModelError)
    assert "constraint" in str(failed)
    assert fine == Choice(0)


def test_a_row_that_could_only_end_too_early_is_told_what_to_loosen() -> None:
    (failed,) = choose(torch.zeros(1, 5), [state_of(ends=tuple(range(5)), min_new_tokens=2)])
    assert isinstance(failed, ModelError)
    assert all(name in str(failed) for name in ("constraint", "min_new_tokens", "logit_bias"))


def test_no_rows_no_choices() -> None:
    assert choose(torch.zeros(0, 5), []) == []


def test_random_numbers_are_a_function_of_seed_and_index() -> None:
    def numbers(seed: int | None, index: int, **params: Any) -> list[float]:
        state, found = state_of(seed=seed, index=index, **params), []
        for _ in range(5):
            found.append(state.uniform)
            state.note(Choice(0))
        return found

    assert numbers(7, 0) == numbers(7, 0, n=3) == numbers(7, 0, temperature=0.5)
    different = [numbers(7, 0), numbers(7, 1), numbers(7, 2), numbers(8, 0), numbers(71, 0)]
    assert len({tuple(found) for found in different}) == 5
    assert numbers(None, 0) != numbers(None, 0)
    assert numbers(0, 0)[0] == pytest.approx(FIRST_OF_SEED_0, abs=0)


FIRST_OF_SEED_0 = 0.34268425763729726
"""`random.Random("0/0").random()`: answers of a seed stay what they are from version to version."""


def test_choosing_changes_no_state_and_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state()
    state = state_of(seed=1)
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    assert choose(logits, [state]) == choose(logits, [state])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_answers_differ() -> None:
    first, second = choose(torch.zeros(2, 50_000), [state_of(), state_of()])
    assert first != second


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    found = logprobs(logits, [0, 0], [2, 0])
    values = logits.double().log_softmax(-1)
    assert found[0].logprob == pytest.approx(values[0, 0].item(), abs=1e-6)
    assert [token for token, _ in found[0].top] == [2, 1]
    assert [value for _, value in found[0].top] == pytest.approx(values[0, [2, 1]].tolist(), abs=1e-6)
    assert found[1] == TokenLogprobs(0, pytest.approx(values[1, 0].item(), abs=1e-6), ())


def test_logprobs_are_taken_before_any_rule() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    state = state_of(temperature=0.1, logit_bias={2: 50.0}, top_k=1, logprobs=1)
    (choice,) = choose(logits, [state])
    assert choice.token == 2
    expected = logits.double().log_softmax(-1)[0]
    assert choice.logprob == pytest.approx(expected[2].item(), abs=1e-6)
    assert choice.logprobs.top == ((0, pytest.approx(expected[0].item(), abs=1e-6)),)


def test_of_equal_logprobs_the_lower_ids_are_reported_first() -> None:
    logits = torch.zeros(2, 500)
    logits[1, [400, 30]] = 1.0
    for dtype in (torch.float32, torch.bfloat16):
        found = logprobs(logits.to(dtype), [0, 0], [3, 4])
        assert [token for token, _ in found[0].top] == [0, 1, 2]
        assert [token for token, _ in found[1].top] == [30, 400, 0, 1]
    assert len(logprobs(logits, [0, 0], [3, 900])[1].top) == 500


def test_the_score_is_the_mean_log_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    state, plain = state_of(best_of=2, seed=3), state_of(seed=3)
    total = 0.0
    for _ in range(4):
        (choice,) = choose(logits, [state])
        assert choose(logits, [plain]) == [Choice(choice.token)]
        assert choice.logprobs is None
        total += logits.double().log_softmax(-1)[0, choice.token].item()
        state.note(choice)
        plain.note(choice)
    assert state.score == pytest.approx(total / 4, abs=1e-6)


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
        ({"typical_p": 0.0}, "typical_p"),
        ({"typical_p": 1.5}, "typical_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty"),
        ({"logit_bias": {"a": 1.0}}, "integers ≥ 0, as keys, got 'a'"),
        ({"logit_bias": {-1: 1.0}}, "integers ≥ 0, as keys, got -1"),
        ({"logit_bias": {1.5: 1.0}}, "got 1.5"),
        ({"logit_bias": {True: 1.0}}, "got True"),
        ({"logit_bias": {"1": math.nan}}, "token 1, got nan"),
        ({"logit_bias": {1: "much"}}, "token 1, got 'much'"),
        ({"logit_bias": [1]}, "expected a table"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is above max_new_tokens 8"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"n": 0}, "'n'"),
        ({"n": 3, "best_of": 2}, "best_of 2 is below n 3"),
        ({"best_of": 0}, "best_of"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop_ids": [-1]}, "stop_ids"),
        ({"stop_ids": "a"}, "stop_ids"),
        ({"choice": []}, "at least one text"),
        ({"choice": [""]}, "choice"),
        ({"regex": ""}, "regex"),
        ({"grammar": ""}, "grammar"),
        ({"json_schema": False}, "json_schema"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[" * 100_000}, "json_schema"),
        ({"json_schema": "3"}, "json_schema"),
        ({"regex": "a", "choice": ["b"]}, "at most one constraint, got regex and choice"),
        ({"json_schema": {}, "grammar": "g"}, "at most one constraint, got json_schema and grammar"),
        ({"regex": "a", "stop": "b"}, "regex and stop contradict"),
        ({"json_schema": True, "stop_ids": [1]}, "json_schema and stop_ids contradict"),
        ({"choice": ["a"], "ignore_eos": True}, "choice and ignore_eos contradict"),
        ({"overflow": "wrap"}, "overflow"),
        ({"priority": 0.5}, "priority"),
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse(SamplingParams, setting, "sampling")
    with pytest.raises(SettingsError) as direct:
        SamplingParams(**setting)
    assert "\n" not in str(caught.value)
    assert str(direct.value) == str(caught.value)


def test_settings_may_be_written_as_json_writes_them() -> None:
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")
    assert SamplingParams(stop_ids=5).stop_ids == (5,)
    assert SamplingParams(stop_ids=[5, 6]).stop_ids == (5, 6)
    assert SamplingParams(logit_bias={"123": -1}).logit_bias == {123: -1.0}
    assert SamplingParams(json_schema='{"type": "object"}').json_schema == {"type": "object"}
    assert SamplingParams(json_schema="true").json_schema is True
    assert SamplingParams(choice=["a", "b"]).choice == ("a", "b")


def test_whether_an_answer_is_constrained() -> None:
    assert not SamplingParams().constrained
    assert all(
        SamplingParams(**one).constrained
        for one in ({"json_schema": {}}, {"json_schema": True}, {"regex": "a"}, {"choice": ["a"]})
    )


def test_settings_survive_being_written_down() -> None:
    for params in (SamplingParams(), SamplingParams(choice=["a"], logit_bias={3: 1.0}, best_of=3)):
        assert parse(SamplingParams, params.model_dump()) == params
        assert parse(SamplingParams, params.model_dump(mode="json")) == params


@pytest.mark.parametrize(
    "params",
    [
        {"min_new_tokens": 1}, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"logprobs": 0}, {"temperature": 0.5},
        {"n": 1, "best_of": 2}, {"constraint": Allowing(8, [1])},
    ],
    ids=lambda params: next(iter(params)),
)  # fmt: skip
def test_a_state_that_a_rule_may_ever_be_asked_for_is_not_merely_greedy(params: dict[str, Any]) -> None:
    assert state_of(temperature=0.0).greedy
    assert state_of(temperature=0.0, top_k=2, top_p=0.5, min_p=0.1, seed=1).greedy
    assert not state_of(**{"temperature": 0.0, **params}).greedy

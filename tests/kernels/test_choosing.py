"""The compiled choice keeps and draws what plain torch does, and a row's bits are its own affair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from puna.engine import draw, rules
from puna.engine.params import SamplingParams
from puna.engine.state import SamplingState
from puna.kernels.choosing import NO_TOKEN, NOT_FINITE, Asked, Chooser, Found, chooser_on
from puna.kernels.library import load

pytestmark = pytest.mark.skipif(load("choosing").functions is None, reason=load("choosing").fault)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VANISHED = -87.3  # weights relative to the largest are 0 from here on: float32 has no normal numbers for them
ROUNDING = 2e-6  # of probabilities in float32, and of sums of them


@pytest.fixture
def choose() -> Chooser:
    chooser = chooser_on(torch.device("cpu"))
    assert chooser is not None
    return chooser


def drawn(choose: Chooser, logits: Tensor, asked: Asked) -> tuple[Found, Tensor]:
    """What is found of one row (V,), and the probabilities (V,) that its token was drawn with."""
    weights = torch.full((1, len(logits)), math.nan, dtype=torch.float64)
    (found,) = choose(logits[None], None, {}, [asked], weights)
    return found, weights[0] / weights[0].sum()


def plain(logits: Tensor, asked: Asked) -> tuple[int, Tensor]:
    """By plain torch: the token, and which may be drawn (V,)."""
    names = ("temperature", "top_p", "min_p", "typical_p", "top_k")
    state = SamplingState(SamplingParams(**{name: getattr(asked, name) for name in names}), [0], [])
    state.uniform = asked.uniform
    wide = logits[None].to(torch.promote_types(logits.dtype, torch.float32))
    peaks = draw.in_blocks(wide, -torch.inf).amax(dim=-1)
    setting = torch.tensor([asked.temperature])
    scaled = rules.temperature(wide, setting, peaks.amax(dim=-1))
    weights = scaled.softmax(dim=-1)
    V = len(logits)
    floor = draw._floor(scaled, rules.temperature(peaks, setting, peaks.amax(dim=-1)), weights, [state], V)
    kept = scaled >= floor[:, None]
    if asked.typical_p < 1:
        left = torch.where(kept, weights.double(), 0.0)
        kept = rules.typical_p(scaled, left, torch.tensor([asked.typical_p], dtype=torch.float64)) > 0
    (token,) = draw.drawn(wide, peaks, [state])
    possible = (weights > 0) & ((scaled > VANISHED) | (wide.dtype == torch.float64))
    return token, (kept & possible)[0]


def row(kind: str, V: int, seed: int = 0) -> Tensor:
    """Logits of one row (V,)."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(V, generator=source, dtype=torch.float64)
    match kind:
        case "flat":
            return 0.01 * x
        case "peaked":
            return 6 * x
        case "equal":
            return torch.zeros(V, dtype=torch.float64)
        case "ties":
            return (2 * x).round() / 2
        case "forbidden":
            allowed = (torch.arange(V) % 4 == 1).index_fill(0, torch.tensor([V // 2]), True)
            return (3 * x).where(allowed, -math.inf)
        case "far":  # what some models give to ids that stand for nothing
            return x.where(torch.rand(V, generator=source) < 0.7, -3e4).index_fill(0, torch.tensor([0]), 1.0)
    return x


KINDS = ("normal", "flat", "peaked", "equal", "ties", "forbidden", "far")
SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 41},
    {"top_k": 41, "top_p": 0.9},
    {"top_k": 701, "top_p": 0.8},
    {"top_k": 3000},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.9},
    {"typical_p": 0.01},
    {"top_k": 307, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8},
    {"top_p": 0.95, "typical_p": 0.6},
]


@pytest.mark.parametrize("V", [1, 2, 17, 64, 1000, 32_003])
@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_and_draws_what_plain_torch_does(choose: Chooser, kind: str, V: int) -> None:
    """Kept sets are equal; a token may differ only where the number drawn lies at the border of two."""
    for at, setting in enumerate(SETTINGS):
        dtype, warmth = DTYPES[at % 4], (1.0, 0.7, 2.0)[at % 3]
        asked = Asked(uniform=(0.37 * at + 0.11) % 1, temperature=warmth, **setting)
        logits = row(kind, V, seed=V + at).to(dtype)
        found, probabilities = drawn(choose, logits, asked)
        token, kept = plain(logits, asked)
        assert torch.equal(probabilities > 0, kept), setting
        assert probabilities[found.token] > 0
        assert as_good(found.token, token, asked.uniform, probabilities), setting


def test_a_wide_vocabulary(choose: Chooser) -> None:
    logits = row("normal", 128_256)
    for setting in ({"top_p": 0.95}, {"top_k": 50, "top_p": 0.9}, {"typical_p": 0.9}, {}):
        asked = Asked(0.77, 1.0, **setting)
        for dtype in (torch.float32, torch.bfloat16):
            found, probabilities = drawn(choose, logits.to(dtype), asked)
            token, kept = plain(logits.to(dtype), asked)
            assert torch.equal(probabilities > 0, kept)
            assert found.token == token


@pytest.mark.parametrize("warmth", [1e-300, 1e-30, 1e-6, 0.01, 30.0, 1e6, 1e29, 1e300])
def test_extreme_temperatures(choose: Chooser, warmth: float) -> None:
    for at, setting in enumerate(SETTINGS):
        asked = Asked(uniform=0.9 - 0.05 * at, temperature=warmth, **setting)
        for kind in ("normal", "ties", "forbidden"):
            logits = row(kind, 1511, at).float()  # few shares of primes are whole numbers of equal tokens
            found, probabilities = drawn(choose, logits, asked)
            token, kept = plain(logits, asked)
            assert torch.equal(probabilities > 0, kept), (setting, kind)
            assert probabilities[found.token] > 0
            assert as_good(found.token, token, asked.uniform, probabilities)


def as_good(token: int, other: int, uniform: float, probabilities: Tensor) -> bool:
    """Whether two tokens are the same, or the number drawn lies within rounding of where one ends."""
    low, high = sorted((token, other))
    reached = probabilities.cumsum(0)
    return low == high or bool(reached[high - 1] - ROUNDING < uniform < reached[low] + ROUNDING)


@pytest.mark.parametrize("p", [1 - 1e-7, 1 - 1e-12, 1 - 2**-53, 5e-324])
def test_top_p_at_its_ends(choose: Chooser, p: float) -> None:
    for kind in KINDS:
        logits = row(kind, 5000).float()
        found, probabilities = drawn(choose, logits, Asked(0.5, 1.0, top_p=p))
        whole = logits.double().softmax(-1)
        left = probabilities > 0
        assert left[found.token]
        assert left[logits.argmax()]
        if p < 0.5:
            assert torch.equal(left, logits == logits.max())
        else:
            assert whole[~left].sum() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_exact_to_their_last_digits(choose: Chooser, kind: str) -> None:
    logits = row(kind, 3001).float()
    weights = torch.empty(1, 3001, dtype=torch.float64)
    choose(logits[None], None, {}, [Asked(0.5, 0.9)], weights)
    distance = (logits.max() - logits) / 0.9
    exact = (-distance.double()).exp()
    common = distance < 87
    assert (weights[0] / exact - 1)[common].abs().max() < 2.5e-7
    assert weights[0][distance > 88].sum() == 0


def test_float64_logits_stay_float64(choose: Chooser) -> None:
    logits = torch.tensor([0.0, 1e-12, -700.0], dtype=torch.float64)
    found, probabilities = drawn(choose, logits, Asked(0.1, 1.0, top_k=1, top=2))
    assert found.token == 1 and probabilities.tolist() == [0, 1, 0]
    _, probabilities = drawn(choose, logits, Asked(0.1, 1.0))
    assert torch.allclose(probabilities, logits.softmax(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_a_small_type_is_read_as_it_is(choose: Chooser, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.abs() < 1e5)]
    for values in (every, every[:-3], every[every.abs() < 1e-3]):
        warmth = values.max().item() / 5
        asked = [Asked(0.3, warmth), Asked(0.3, warmth, top_k=99), Asked()]
        asked = [one._replace(top=50) for one in asked]
        found = [
            choose(x.expand(3, -1), None, {}, asked, weights) for x, weights in both(values, len(values))
        ]
        assert found[0] == found[1]
    pairs = torch.stack([every, torch.ones_like(every)], dim=1)
    asked = [Asked(token=0, top=2)] * len(pairs)
    assert choose(pairs, None, {}, asked) == choose(pairs.float(), None, {}, asked)


def both(values: Tensor, V: int) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.zeros(3, V, dtype=torch.float64)) for x in (values, values.float())]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_equal_alone_in_company_and_on_any_number_of_threads(
    choose: Chooser, dtype: torch.dtype
) -> None:
    V, B = 9001, 24
    logits = torch.stack([row(KINDS[at % 7], V, at) for at in range(B)]).to(dtype)
    asked = [
        Asked(0.61 * at % 1, (0.0, 1.0, 0.7)[at % 3], top=at % 5 - 1, **SETTINGS[at % len(SETTINGS)])
        for at in range(B)
    ]
    alone, kept = [], torch.zeros(B, V, dtype=torch.float64)
    for at in range(B):
        alone += choose(logits[at : at + 1], None, {}, asked[at : at + 1], kept[at : at + 1])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for some in (slice(0, B), slice(3, 20)):
            weights = torch.zeros(B, V, dtype=torch.float64)
            assert choose(logits[some], None, {}, asked[some], weights[some]) == alone[some]
            assert torch.equal(weights[some], kept[some])


@pytest.mark.parametrize("setting", [{}, {"top_k": 30}, {"top_p": 0.9}, {"typical_p": 0.9}])
def test_borders_between_tokens_are_the_same_alone_and_in_company(choose: Chooser, setting: dict) -> None:
    """Sums have the same bits: the least number that draws a token or a later one is found bit by bit."""
    logits = row("normal", 3000).float()
    others = torch.randn(3, 3000, generator=torch.Generator().manual_seed(5))
    borders = []
    for company in (False, True):
        low, high = 0.0, 1.0
        while (middle := (low + high) / 2) not in (low, high):
            rows = torch.cat((others, logits[None])) if company else logits[None]
            found = choose(rows, None, {}, [Asked(middle, 1.0, **setting)] * len(rows))[-1]
            low, high = (low, middle) if found.token >= 1500 else (middle, high)
        borders.append(high)
    assert borders[0] == borders[1]
    _, probabilities = drawn(choose, logits, Asked(0.0, 1.0, **setting))
    assert borders[0] == pytest.approx(probabilities[:1500].sum().item(), abs=1e-6)


def test_log_probabilities(choose: Chooser) -> None:
    for V in (1, 3, 500, 3001):
        logits = torch.stack([row(kind, V) for kind in KINDS])
        for dtype in DTYPES:
            x = logits.to(dtype)
            expected = x.double().log_softmax(-1)
            asked = [Asked(0.3, 1.0, top=(0, 1, 5, 700, 10_000, -1, 3)[at]) for at in range(len(x))]
            for at, one in enumerate(choose(x, None, {}, asked)):
                count = min(asked[at].top, V)
                if count < 0:
                    continue
                near = {"abs": 1e-6, "rel": 3e-7}
                assert one.logprob == pytest.approx(expected[at, one.token].item(), **near)
                order = sorted(range(V), key=lambda i: (-x[at, i].item(), i))[:count] if count else []
                assert [token for token, _ in one.top] == order
                assert [value for _, value in one.top] == pytest.approx(expected[at, order].tolist(), **near)


def test_faults_are_each_rows_own(choose: Chooser) -> None:
    logits = torch.stack([row("normal", 700, at) for at in range(6)]).float()
    logits[1, 699], logits[2, 3] = math.nan, math.inf
    logits[3] = -math.inf
    changed = logits[[1, 4, 5]].clone()
    changed[1], changed[2, 7] = -math.inf, 50.0
    found = choose(logits, changed, {1: 0, 4: 1, 5: 2}, [Asked(top=2)] * 6)
    assert [one.fault for one in found] == [0, NOT_FINITE, NOT_FINITE, NOT_FINITE, NO_TOKEN, 0]
    assert found[0].token == logits[0].argmax() and found[5].token == 7
    assert found[5].logprob == pytest.approx(logits[5].log_softmax(-1)[7].item(), abs=1e-6)
    assert found[5].top[0][0] == logits[5].argmax()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_is_looked_at(choose: Chooser, dtype: torch.dtype) -> None:
    V = 1111
    logits = torch.zeros(V, V, dtype=dtype)
    for number in (5.0, math.nan, math.inf):
        found = choose(logits.fill_diagonal_(number), None, {}, [Asked(0.5, at % 2 / 50) for at in range(V)])
        if number == 5:
            assert [one.token for one in found] == list(range(V))
        assert all(one.fault == (0 if number == 5 else NOT_FINITE) for one in found)


def test_rows_need_not_lie_side_by_side(choose: Chooser) -> None:
    wide = torch.randn(5, 999, generator=torch.Generator().manual_seed(1))
    asked = [Asked(0.4, 1.0, top_p=0.8, top=3)] * 5
    expected = choose(wide[:, 10:900].contiguous(), None, {}, asked)
    assert choose(wide[:, 10:900], None, {}, asked) == expected
    assert choose(wide[:, 10:900].t().contiguous().t(), None, {}, asked) == expected
    assert choose(wide[:1, 10:900].expand(5, -1), None, {}, asked) == expected[:1] * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_of_every_row(choose: Chooser, dtype: torch.dtype) -> None:
    """The first of equals; none where a row is not finite; rows need not lie side by side."""
    for V in (1, 63, 64, 1000, 32_003):
        logits = torch.randn(7, 2 * V, generator=torch.Generator().manual_seed(V)).to(dtype)[:, :V]
        logits[2] = 1.5
        logits[3, V - 1] = logits[3, V // 2] = 100
        logits[4, V // 3], logits[5, V // 3], logits[6, V // 3] = math.nan, math.inf, -math.inf
        expected = [int((row == row.max()).nonzero()[0]) for row in logits[:4]]
        found = list(choose.likeliest(logits))
        assert found[:4] == expected
        assert found[4:6] == [-1, -1]
        assert found[6] == (-1 if V == 1 else int(logits[6].argmax()))
        assert found == [one for row in logits for one in choose.likeliest(row[None])]

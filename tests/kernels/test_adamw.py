"""AdamW and the norm before it: the paper's numbers, stochastic rounding's chances, and the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from puna.kernels import adamw
from puna.kernels.adamw import Rates, Update
from puna.kernels.library import load
from puna.kernels.rounding import Key, random_halves, rounded

FLOAT, BFLOAT = torch.float32, torch.bfloat16
RATES = Rates(rate=0.02, betas=(0.9, 0.95), eps=1e-8, factor=0.5)
SIZES = [(1,), (5,), (16,), (33, 17), (16384,), (3, 16385)]

compiled = pytest.mark.skipif(load("adamw").functions is None, reason=load("adamw").fault)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update_of(shape: tuple[int, ...], kind: tuple[torch.dtype, ...], seed: int = 0) -> Update:
    weight, gradient, moment = kind
    wide = normal(shape, seed)
    return Update(
        wide.to(weight),
        normal(shape, seed + 1).to(gradient),
        (normal(shape, seed + 2) / 10).to(moment),
        (normal(shape, seed + 3).square() / 10).to(moment),
        wide.clone() if weight == BFLOAT and moment == FLOAT else None,
        step=3,
        decay=0.1,
        key=Key.of(0, 3, str(seed)),
    )


def updates_of(kind: tuple[torch.dtype, ...]) -> list[Update]:
    return [update_of(shape, kind, seed) for seed, shape in enumerate(SIZES)]


def copied(updates: list[Update], dtype: torch.dtype | None = None) -> list[Update]:
    """The same in memory of their own, and in another type if one is given."""

    def copy(x: Tensor) -> Tensor:
        return x.to(dtype or x.dtype, copy=True)

    return [
        one._replace(
            weight=copy(one.weight), gradient=copy(one.gradient), first=copy(one.first),
            second=copy(one.second), master=None if one.master is None else copy(one.master),
        )
        for one in updates
    ]  # fmt: skip


def results(one: Update) -> list[Tensor]:
    return [x for x in (one.weight, one.first, one.second, one.master) if x is not None]


def same(one: list[Update], other: list[Update]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(results(a), results(b), strict=True))


def exact(one: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after algorithm 2 of arXiv 1711.05101, in float64."""
    source = one.weight if one.master is None else one.master
    g = one.gradient.double() * RATES.factor
    m, v = one.first.double() * 0.9 + g * 0.1, one.second.double() * 0.95 + g**2 * 0.05
    change = (m / (1 - 0.9**3)) / ((v / (1 - 0.95**3)).sqrt() + 1e-8)
    return source.double() * (1 - 0.02 * 0.1) - 0.02 * change, m, v


@pytest.mark.parametrize("way", ["update", "plain_update", "fused_update"])
@pytest.mark.parametrize("kind", adamw.KINDS[:3], ids=str)
def test_in_float32_it_is_the_papers(kind: tuple[torch.dtype, ...], way: str) -> None:
    updates = updates_of(kind)
    expected = [exact(one) for one in updates]
    getattr(adamw, way)(updates, RATES)
    for one, (weight, m, v) in zip(updates, expected, strict=True):
        wide = one.weight if one.master is None else one.master
        assert torch.allclose(wide.double(), weight, rtol=4e-7, atol=2e-7)
        assert torch.allclose(one.first.double(), m, rtol=3e-7, atol=3e-8)
        assert torch.allclose(one.second.double(), v, rtol=3e-7, atol=3e-8)
        assert one.master is None or torch.equal(one.weight, one.master.bfloat16())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", adamw.KINDS[:3], ids=str)
def test_on_cuda_it_is_the_papers(kind: tuple[torch.dtype, ...]) -> None:
    updates = updates_of(kind)
    expected = [exact(one) for one in updates]
    there = [
        one._replace(
            weight=one.weight.cuda(), gradient=one.gradient.cuda(), first=one.first.cuda(),
            second=one.second.cuda(), master=None if one.master is None else one.master.cuda(),
        )
        for one in updates
    ]  # fmt: skip
    adamw.update(there, RATES)
    for one, (weight, m, v) in zip(there, expected, strict=True):
        wide = one.weight if one.master is None else one.master
        for found, wanted in ((wide, weight), (one.first, m), (one.second, v)):
            torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-6, atol=3e-7)


@compiled
def test_tensors_that_do_not_belong_together_are_not_updated() -> None:
    one = update_of((12, 9), (BFLOAT, BFLOAT, FLOAT))
    wrong = [
        one._replace(gradient=one.gradient[1:]), one._replace(master=None),
        one._replace(second=one.second.bfloat16()),
    ]  # fmt: skip
    for each in wrong:
        with pytest.raises(AssertionError):
            adamw.update([each], RATES)


def test_parameters_may_be_at_different_steps_in_torchs_fused_code() -> None:
    updates = [
        update_of((33, 17), (FLOAT, FLOAT, FLOAT), seed)._replace(step=1 + 9 * seed) for seed in range(3)
    ]
    plain = copied(updates, torch.float64)
    adamw.fused_update(updates, RATES)
    adamw.plain_update(plain, RATES)
    for one, other in zip(updates, plain, strict=True):
        torch.testing.assert_close(one.weight.double(), other.weight, rtol=1e-6, atol=1e-6)


def test_in_float64_it_is_the_papers() -> None:
    updates = copied(updates_of((FLOAT, FLOAT, FLOAT)), torch.float64)
    expected = [exact(one) for one in updates]
    adamw.update(updates, RATES)
    for one, (weight, m, v) in zip(updates, expected, strict=True):
        for found, wanted in ((one.weight, weight), (one.first, m), (one.second, v)):
            assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)


@compiled
@pytest.mark.parametrize("kind", adamw.KINDS[3:], ids=str)
def test_in_bfloat16_it_is_the_float32_update_rounded_by_the_same_bits(kind: tuple[torch.dtype, ...]) -> None:
    updates = updates_of(kind)
    plain = copied(updates)
    adamw.update(updates, RATES)
    adamw.plain_update(plain, RATES)
    for one, other in zip(updates, plain, strict=True):
        for found, wanted in zip(results(one), results(other), strict=True):
            # A last bit of float32 before rounding, where additions and products are formed in one.
            assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=1e-8)
            assert (found != wanted).sum() <= 1 + 1e-3 * found.numel()


@compiled
@pytest.mark.parametrize("kind", adamw.KINDS, ids=str)
def test_bits_are_the_same_on_any_number_of_threads_and_in_any_company(kind: tuple[torch.dtype, ...]) -> None:
    updates = [*updates_of(kind), update_of((70, 1000), kind, 9)]
    alone, several = copied(updates), copied(updates)
    torch.set_num_threads(1)
    for one in alone:
        adamw.update([one], RATES)
    torch.set_num_threads(3)
    adamw.update(several[::-1], RATES)
    assert same(alone, several)


@pytest.mark.parametrize("kind", adamw.KINDS, ids=str)
def test_parts_of_a_large_parameter_are_updated_as_the_whole(
    kind: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [update_of((50, 30), kind)]
    parts = copied(whole)
    adamw.plain_update(whole, RATES)
    monkeypatch.setattr(adamw, "PART", 400)
    adamw.plain_update(parts, RATES)
    assert same(whole, parts)


def test_gradients_of_any_layout() -> None:
    one = update_of((12, 9), (FLOAT, FLOAT, FLOAT))
    other = copied([one])[0]._replace(gradient=one.gradient.t().contiguous().t())
    adamw.update([one], RATES)
    adamw.update([other], RATES)
    assert torch.allclose(one.weight, other.weight, rtol=1e-6)
    assert adamw.norm([other.gradient]) == pytest.approx(adamw.norm([one.gradient]), rel=1e-12)


# The norm


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, torch.float64])
def test_norm(dtype: torch.dtype) -> None:
    gradients = [normal(shape, seed).to(dtype) for seed, shape in enumerate(SIZES)]
    wanted = math.sqrt(sum(float(x.double().square().sum()) for x in gradients))
    assert adamw.norm(gradients) == pytest.approx(wanted, rel=1e-12)
    assert adamw.plain_norm(gradients) == pytest.approx(wanted, rel=1e-5)
    assert adamw.norm([*gradients, normal((7,), 8).half()]) > wanted  # types that are not compiled for


def test_a_norm_of_nothing_is_zero() -> None:
    assert adamw.norm([]) == 0


@compiled
def test_squares_of_large_numbers_do_not_overflow_in_the_norm() -> None:
    assert adamw.norm([torch.full((50,), 1e30)]) == pytest.approx(1e30 * math.sqrt(50), rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 20000, 69999])
def test_a_number_that_is_not_finite_shows_in_the_norm(bad: float, at: int) -> None:
    gradient = normal((70000,), 1)
    gradient[at] = bad
    assert not math.isfinite(adamw.norm([normal((5,), 2), gradient]))


@compiled
def test_the_norms_bits_are_the_same_on_any_number_of_threads() -> None:
    gradients = [normal((70, 1001), seed) for seed in range(3)]
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(adamw.norm(gradients))
    assert len(found) == 1


# Stochastic rounding


def test_rounding_goes_up_with_the_chance_of_the_distance() -> None:
    """1 + f/128 for a fraction f: of 200,000 roundings about f·200,000 give the upper neighbour."""
    count = 200_000
    halves = random_halves(count, Key.of(1, 1, "x"), torch.device("cpu"))
    for number, fraction in enumerate((0.0, 0.01, 0.25, 0.5, 0.9)):
        for sign in (1, -1):
            x = torch.full((count,), sign * (1 + fraction / 128))
            found = rounded(x, halves[number % 3]).float() * sign
            assert set(found.unique().tolist()) <= {1.0, 1 + 1 / 128}
            spread = math.sqrt(fraction * (1 - fraction) / count)
            share = float((found > 1).double().mean())
            assert abs(share - fraction) <= 4 * spread + 1e-5


def test_random_numbers_are_even_and_apart() -> None:
    keys = [Key.of(seed, step, name) for seed in range(2) for step in range(2) for name in "ab"]
    assert len(set(keys)) == 8
    columns = [half for key in keys for half in random_halves(50_000, key, torch.device("cpu"))]
    numbers = torch.stack(columns).double() / 2**16 - 0.5
    assert numbers.mean(1).abs().max() < 4 / math.sqrt(12 * 50_000)
    related = torch.corrcoef(numbers) - torch.eye(len(columns))
    assert related.abs().max() < 5 / math.sqrt(50_000)
    # Nor do neighbours know of each other.
    assert (numbers[:, 1:] * numbers[:, :-1]).mean(1).abs().max() < 5 / 12 / math.sqrt(50_000)


def test_numbers_that_are_not_finite_stay_so() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    found = rounded(x, torch.full((5,), 0xFFFF)).float()
    assert found[0] == math.inf and found[1] == -math.inf and found[2].isnan()
    assert found[3:].tolist() == [0.0, 0.0]


def test_the_mean_of_many_updates_is_that_of_float32() -> None:
    """Each of 100 updates is a 60th of a last bit; rounded to nearest none would ever be seen."""
    size, steps = 4096, 100
    pure = Update(
        torch.ones(size, dtype=BFLOAT), torch.ones(size, dtype=BFLOAT), torch.zeros(size, dtype=BFLOAT),
        torch.zeros(size, dtype=BFLOAT), None, 0, 0.0, Key(0, 0),
    )  # fmt: skip
    wide = copied([pure], FLOAT)[0]
    for step in range(1, steps + 1):
        rates = RATES._replace(rate=1 / (60 * 256), factor=1.0)
        adamw.update([pure._replace(step=step, key=Key.of(0, step, "x"))], rates)
        adamw.update([wide._replace(step=step)], rates)
    moved = 1 - wide.weight[0]
    assert moved == pytest.approx(steps / (60 * 256), rel=1e-3)
    # A number is off by at most a last bit or two; their mean by 1/√size of it.
    assert float((1 - pure.weight.float()).mean()) == pytest.approx(float(moved), rel=0.05)
    assert float(pure.first.float().mean()) == pytest.approx(float(wide.first[0]), rel=2e-3)
    assert float(pure.second.float().mean()) == pytest.approx(float(wide.second[0]), rel=2e-3)


def test_a_second_moment_in_bfloat16_decays_as_slowly_as_it_should() -> None:
    """At β₂ = 0.999 rounding to nearest would leave it where it was for ever."""
    size = 4096
    one = update_of((size,), (BFLOAT, BFLOAT, BFLOAT))._replace(
        gradient=torch.zeros(size, dtype=BFLOAT), second=torch.ones(size, dtype=BFLOAT)
    )
    for step in range(1, 301):
        adamw.update([one._replace(step=step, key=Key.of(0, step, "v"))], RATES._replace(betas=(0.9, 0.999)))
    assert float(one.second.float().mean()) == pytest.approx(0.999**300, rel=5e-3)

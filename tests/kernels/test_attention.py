"""Attention over blocks equals the plain formula, and a row's bits depend on nothing beside it."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from puna.kernels.attention import plain, quantized
from puna.kernels.library import load
from puna.kernels.native import native
from puna.kernels.pages import BLOCK, Attend, Pages, Step, page_shapes
from puna.model.attention import first_keys, reference

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2**-8, torch.float16: 2**-10}
Bind = Callable[[Pages, torch.dtype], Attend]

needs_compiler = pytest.mark.skipif(
    load("paged_attention").functions is None, reason=load("paged_attention").fault
)
KERNELS = [
    pytest.param(native, marks=needs_compiler, id="native"),
    pytest.param(lambda pages, dtype: plain(pages), id="plain"),
]


@dataclass(frozen=True)
class Case:
    """Sequences of some lengths, all of which go through the same pages."""

    lengths: tuple[int, ...]
    G: int = 2
    K: int = 2
    H: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    int8: bool = False

    def data(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q (T, N, H), k and v (T, K, H) of every sequence."""
        generator = torch.Generator().manual_seed(sum(self.lengths))
        return [
            tuple(
                torch.randn(length, heads, self.H, generator=generator).to(self.dtype)
                for heads in (self.G * self.K, self.K, self.K)
            )
            for length in self.lengths
        ]  # type: ignore[misc]

    def pages(self, stale: float = math.nan) -> Pages:
        """Blocks that an earlier owner left with numbers that must have no effect."""
        blocks, dtype = self.blocks() + 2, torch.int8 if self.int8 else self.dtype
        keys, values = (
            torch.zeros(shape, dtype=dtype) for shape in page_shapes(blocks, self.K, self.H, dtype)
        )
        if self.int8:
            return Pages(keys, values, *(torch.full((blocks, self.K, BLOCK), stale) for _ in range(2)))
        keys.fill_(stale)
        values[:, :, :, : self.H] = stale
        return Pages(keys, values)

    def blocks(self) -> int:
        return sum(-(-length // BLOCK) for length in self.lengths)

    def tables(self) -> list[list[int]]:
        """Blocks in no order."""
        order = iter(random.Random(1).sample(range(self.blocks() + 2), self.blocks()))
        return [[next(order) for _ in range(-(-length // BLOCK))] for length in self.lengths]

    def expected(self) -> list[Tensor]:
        """The plain formula in float64, of what an int8 cache holds where it is one."""
        return [self._whole(*rows) for rows in self.data()]

    def _whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.int8:
            k, v = (codes.double() * scale.double()[..., None] for codes, scale in map(quantized, (k, v)))
        q, k, v = (x.double()[None] for x in (q, k, v))
        starts = first_keys(q.shape[1], self.window, None, q.device)
        return reference(q, k, v, starts=starts, causal=True, dropout=0.0)[0]


def attended(
    case: Case, bind: Bind, cut: Callable[[int], int] = lambda left: left, padding: int = 0
) -> list[Tensor]:
    """All sequences, side by side, in chunks of cut(rows left) each; a chunk of 0 sits a step out."""
    attend, data, tables = bind(case.pages(), case.dtype), case.data(), case.tables()
    done, found = [0] * len(data), [[] for _ in data]
    while any(at < length for at, length in zip(done, case.lengths, strict=True)):
        counts = [
            cut(length - at) if at < length else 0 for at, length in zip(done, case.lengths, strict=True)
        ]
        those = [number for number, count in enumerate(counts) if count]
        step = Step(
            [passed(tables[number], done[number], case.window) for number in those],
            [done[number] for number in those],
            [counts[number] for number in those],
            sum(counts) + padding,
            case.window,
        )
        columns = (
            [
                torch.cat(
                    [data[number][which][done[number] : done[number] + counts[number]] for number in those]
                )
                for which in range(3)
            ]
            if those
            else [x[:0] for x in data[0]]
        )
        columns = [
            torch.cat((x, torch.full((padding, *x.shape[1:]), math.nan, dtype=x.dtype))) for x in columns
        ]
        out = attend(step, *(column[None] for column in columns))[0]
        assert not out[sum(counts) :].any()
        for number, rows in zip(those, out[: sum(counts)].split([counts[n] for n in those]), strict=True):
            found[number].append(rows)
            done[number] += len(rows)
    return [torch.cat(rows) for rows in found]


def passed(table: list[int], start: int, window: int | None) -> list[int]:
    """The table without the blocks that the window has left behind."""
    first = 0 if window is None else max(0, start - window + 1) // BLOCK
    return [-1] * first + table[first:]


def largest_gap(ours: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, expected, strict=True)
    )


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


SHAPES = [
    Case((1,), H=4),
    Case((70, 3), G=1, K=3, H=6),
    Case((64, 65, 63), G=3, H=18),
    Case((130,), G=8, K=1, H=64),
    Case((300, 1), G=2, K=2, H=48),
    Case((100, 129), G=5, K=1, H=80),
    Case((90,), G=1, K=2, H=128),
    Case((20,), G=70, K=1, H=8),
    Case((200, 90), window=1),
    Case((200, 90), window=2, H=50),
    Case((200, 90), window=64),
    Case((200, 90), window=100, G=4),
    Case((200, 90), window=1000),
]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("bind", KERNELS)
def test_it_equals_the_formula(bind: Bind, case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    assert largest_gap(attended(case, bind), case.expected()) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bind", KERNELS)
def test_an_int8_cache_equals_the_formula_of_what_it_holds(bind: Bind, dtype: torch.dtype) -> None:
    for shape in (Case((130, 5), H=64, int8=True), Case((200, 3), window=70, H=18, int8=True)):
        case = replace(shape, dtype=dtype)
        tolerance = max(ROUNDING[dtype], 1e-6)  # scales are float32
        assert largest_gap(attended(case, bind), case.expected()) < tolerance


@pytest.mark.parametrize("bind", KERNELS)
def test_an_int8_cache_is_within_half_a_step_of_what_it_was_given(bind: Bind) -> None:
    """One key is seen: the result is its value, which is off by half of absmax / 127 at most."""
    case = Case((200,), window=1, int8=True)
    values = case.data()[0][2].repeat_interleave(case.G, dim=1)
    step = values.abs().amax(dim=-1, keepdim=True) / 127
    assert ((attended(case, bind)[0] - values).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bind", KERNELS)
def test_bits_are_equal_in_any_chunks_company_and_threads(bind: Bind, dtype: torch.dtype, int8: bool) -> None:
    case = Case((130, 66, 9), G=3, H=18, dtype=dtype, int8=int8, window=100)
    draw = random.Random(2)
    whole = attended(case, bind)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cuts = [lambda left: min(left, draw.choice([0, 5, 64])), lambda left: min(left, 33)]
        assert all(same(attended(case, bind, cut, padding=3), whole) for cut in cuts)
        alone = [
            attended(replace(case, lengths=(length,)), bound_to(case, number, bind))[0]
            for number, length in enumerate(case.lengths)
        ]
        assert same(alone, whole)


def bound_to(case: Case, number: int, bind: Bind) -> Bind:
    """`bind`, given one sequence's rows of a case that holds several."""

    def alone(pages: Pages, dtype: torch.dtype) -> Attend:
        attend, rows = bind(pages, dtype), case.data()[number]

        def replaced(step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            start, count = step.starts[0], step.counts[0]
            return attend(step, *(x[None, start : start + count] for x in rows))

        return replaced

    return alone


@needs_compiler
@pytest.mark.parametrize("window", [None, 1500])
def test_a_long_context_has_the_same_bits_on_any_number_of_threads(window: int | None) -> None:
    """Spans of 1024 positions are shared out where there are fewer heads than threads."""
    case = Case((3000,), G=2, K=1, H=32, window=window)
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found.append(attended(case, native, lambda left: min(left, 2990 if left > 2990 else 1)))
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert largest_gap(found[0], case.expected()) < 1e-5


@pytest.mark.parametrize("bind", KERNELS)
def test_scores_far_apart_neither_overflow_nor_vanish(bind: Bind) -> None:
    case = Case((130,), H=8)
    q, k, v = case.data()[0]
    pages = case.pages()
    out = bind(pages, torch.float32)(
        Step(case.tables(), [0], [130], 130, None), q[None] * 100, k[None] * 100, v[None]
    )
    expected = case._whole(q * 100, k * 100, v)
    assert torch.allclose(out[0].double(), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bind", KERNELS)
def test_values_that_are_all_alike_stay_what_they_are(bind: Bind, dtype: torch.dtype) -> None:
    """However weights are rounded, they add up to one."""
    case = Case((130,), H=8, dtype=dtype)
    q, k, v = case.data()[0]
    v = torch.full_like(v, 1.3)
    out = bind(case.pages(), dtype)(Step(case.tables(), [0], [130], 130, None), q[None], k[None], v[None])
    assert (out - v[0, 0, 0]).abs().max() <= {torch.float64: 1e-15}.get(dtype, 1e-6)


@pytest.mark.parametrize("bind", KERNELS)
def test_a_pair_that_the_window_cuts_counts_in_half(bind: Bind) -> None:
    """In bfloat16 positions are summed two by two; of those that nobody sees not even NaN does."""
    for window in (1, 2, 3, 64, 65):
        case = Case((70,), window=window, H=8, dtype=torch.bfloat16)
        q, k, v = case.data()[0]
        for seen in (0, 1, 2, 3, 62, 63, 64, 65, 66, 69):  # only what one row sees is a number
            first = max(0, seen - window + 1)
            hidden = torch.full_like(v, math.nan)
            hidden[first : seen + 1] = v[first : seen + 1]
            attend = bind(case.pages(), torch.bfloat16)
            if seen:
                attend(
                    Step(case.tables(), [0], [seen], seen, window),
                    q[None, :seen],
                    k[None, :seen],
                    hidden[None, :seen],
                )
            row = slice(seen, seen + 1)
            out = attend(
                Step(case.tables(), [seen], [1], 1, window), q[None, row], k[None, row], hidden[None, row]
            )
            expected = case._whole(q, k, v)[row]
            assert (out[0].double() - expected).abs().max() < 2**-7


@pytest.mark.parametrize("bind", KERNELS)
def test_a_value_that_is_no_number_reaches_only_those_that_see_it(bind: Bind) -> None:
    case = Case((100, 20), H=8)
    (q, k, v), (q2, k2, v2) = case.data()
    k = k.clone()
    k[70] = math.nan
    step = Step(case.tables(), [0, 0], [100, 20], 120, None)
    out = bind(case.pages(), torch.float32)(
        step, torch.cat((q, q2))[None], torch.cat((k, k2))[None], torch.cat((v, v2))[None]
    )[0]
    wrong = out.isnan().flatten(1).all(dim=1)
    assert wrong.tolist() == [False] * 70 + [True] * 30 + [False] * 20
    assert out[~wrong].isfinite().all()


@needs_compiler
def test_the_exponential_is_right_to_two_units_in_the_last_place() -> None:
    x = torch.cat((torch.linspace(-87, 0, 2**16), torch.tensor([-math.inf] * 8 + [0.0] * 4 + [math.nan] * 4)))
    out = torch.empty_like(x)
    functions = load("paged_attention").functions
    functions.exponentials(*(ctypes.c_void_p(t.data_ptr()) for t in (x, out)), ctypes.c_long(len(x)))
    exact = x[: 2**16].double().exp()
    unit = torch.finfo(torch.float32).eps * 2 ** exact.log2().floor()
    assert ((out[: 2**16].double() - exact).abs() / unit).max() <= 2
    assert out[2**16 :].nan_to_num(7).tolist() == [0.0] * 8 + [1.0] * 4 + [7.0] * 4


def test_quantizing_keeps_zero_and_the_largest() -> None:
    codes, scale = quantized(torch.tensor([[0.0, 0.0], [1.0, -2.54]]))
    assert codes.tolist() == [[0, 0], [50, -127]]
    assert scale.tolist() == pytest.approx([0.0, 0.02])

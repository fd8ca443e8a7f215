"""A linear layer's three products: exact sums to their rounding, the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from puna.kernels import gemm, panels

compiled = pytest.mark.skipif(not gemm.available(), reason="plain torch is used on this processor")

HEIGHTS = [(1,), (5,), (32,), (33, 7, 64), (31, 96), (1030,)]  # of weights one below the other
INPUTS = [1, 2, 31, 33, 64, 288, 1101]
ROWS = [1, 2, 13, 14, 15, 29, 257]
LONG = [
    *((3, 2, (40011,)), (3, 40011, (2,)), (40011, 3, (2,)), (2, 5, (40000, 3, 40001))),
    *((20, 7000, (300,)), (40, 2600, (70,)), (1500, 768, (2051,))),
]
"""(R, I, O) for which what is packed does not fit into memory at once, or sums go on in several passes."""
DTYPES = [torch.float32, torch.bfloat16]
Products = tuple[Tensor, ...]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(
    rows: int, inputs: int, heights: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    """An input, weights, and gradients of outputs."""
    weights = [normal(height, inputs, seed=at).to(dtype) for at, height in enumerate(heights)]
    x, grad = normal(rows, inputs, seed=10), normal(rows, sum(heights), seed=11)
    return x.bfloat16(), weights, grad.bfloat16()


def joint(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(weights)).bfloat16()


def agrees(found: Tensor, first: Tensor, second: Tensor, more: Tensor | None = None) -> bool:
    """Whether `found` is first · second + more, but for sums in float32 and one last rounding."""
    expected, terms = first.double() @ second.double(), first.double().abs() @ second.double().abs()
    if more is not None:
        expected, terms = expected + more.double(), terms + more.double().abs()
    steps = min(first.shape[1], 1024) ** 0.5 + 4  # errors of a sum are of either sign
    bound = terms * steps * 2**-24
    if found.dtype == torch.bfloat16:
        bound += expected.abs() * 2**-8
    return bool(((found.double() - expected).abs() <= bound).all())


def all_three(x: Tensor, weights: Sequence[Tensor], grad: Tensor) -> Products:
    return gemm.linear(x, weights), gemm.input_gradient(grad, weights), gemm.weight_gradient(grad, x)


def right(x: Tensor, weights: Sequence[Tensor], grad: Tensor) -> bool:
    outputs, inputs, weight = all_three(x, weights, grad)
    matrix = joint(weights)
    return agrees(outputs, x, matrix.t()) and agrees(inputs, grad, matrix) and agrees(weight, grad.t(), x)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heights", HEIGHTS, ids=str)
def test_products_are_right_to_the_rounding_of_their_sums(heights: Sequence[int], dtype: torch.dtype) -> None:
    for inputs in INPUTS:
        for rows in ROWS:
            assert right(*layer(rows, inputs, heights, dtype)), (inputs, rows)


@compiled
@pytest.mark.parametrize(("rows", "inputs", "heights"), LONG, ids=str)
def test_long_sums_and_large_weights_in_several_passes(
    rows: int, inputs: int, heights: Sequence[int]
) -> None:
    assert right(*layer(rows, inputs, heights, torch.float32))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_is_added_before_the_rounding(dtype: torch.dtype) -> None:
    x, weights, _ = layer(30, 50, (33, 7, 64), torch.float32)
    bias = [normal(33), None, normal(64, seed=1)]
    rounded = torch.cat((normal(33), torch.zeros(7), normal(64, seed=1))).bfloat16()
    assert agrees(gemm.linear(x, weights, bias, dtype), x, joint(weights).t(), rounded.expand(30, -1))
    with pytest.raises(AssertionError):
        gemm.linear(x, weights, [normal(33), None, normal(63)], dtype)


@compiled
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(200, 50, 39), (2100, 70, 20), (9000, 9, 40)])
def test_weight_gradients_are_added_in_place(rows: int, inputs: int, outputs: int, kind: torch.dtype) -> None:
    x, _, grad = layer(rows, inputs, (outputs,), torch.float32)
    before = 10 * normal(outputs, inputs, seed=3).to(kind)
    out = before.clone()
    assert gemm.weight_gradient(grad, x, out) is out and agrees(out, grad.t(), x, before)
    rounded = gemm.weight_gradient(grad, x, dtype=kind)
    assert rounded.dtype == kind and agrees(rounded, grad.t(), x)


@compiled
def test_results_may_have_their_place() -> None:
    x, weights, _ = layer(70, 40, (33, 20), torch.float32)
    room = torch.zeros(80, 53, dtype=torch.bfloat16)
    assert gemm.linear(x, weights, into=room[:70]).data_ptr() == room.data_ptr()
    assert torch.equal(room[:70], gemm.linear(x, weights)) and room[70:].eq(0).all()
    with pytest.raises(AssertionError):
        gemm.linear(x, weights, into=room)


@compiled
def test_rows_may_lie_apart_in_memory() -> None:
    x, weights, grad = layer(70, 40, (33, 20), torch.float32)
    wide = [torch.cat((each, each), dim=1).clone() for each in (x, *weights, grad)]
    for shift in (0, 3):
        views = [each[:, shift : shift + each.shape[1] // 2] for each in wide]
        apart, together = (views[0], views[1:3], views[3]), [each.clone() for each in views]
        once = all_three(together[0], together[1:3], together[3])
        for one, other in zip(all_three(*apart), once, strict=True):
            assert torch.equal(one, other)
        out = torch.zeros(53, 100)
        gemm.weight_gradient(views[3], views[0], out[:, 7:47])
        assert torch.equal(out[:, 7:47], once[2]) and out[:, :7].eq(0).all() and out[:, 47:].eq(0).all()
    turned = [weight.t().contiguous().t() for weight in weights]  # no row lies together
    for one, other in zip(all_three(x, turned, grad), all_three(x, weights, grad), strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=0.02)


@compiled
@pytest.mark.parametrize(
    ("rows", "inputs", "heights"), [(257, 301, (33, 300)), (40, 2600, (70,)), *LONG[2:6]]
)
def test_bits_depend_neither_on_the_run_nor_on_threads(
    rows: int, inputs: int, heights: Sequence[int]
) -> None:
    given = layer(rows, inputs, heights, torch.float32)
    torch.set_num_threads(1)
    alone = all_three(*given)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        for one, other in zip(all_three(*given), alone, strict=True):
            assert torch.equal(one, other)


@compiled
def test_bits_of_a_row_are_those_of_products_with_panels() -> None:
    x, weights, _ = layer(100, 700, (64, 96), torch.bfloat16)
    packed = panels.into_panels(*weights)
    assert torch.equal(gemm.linear(x, weights), panels.multiply(x, packed, None, 160))
    assert torch.equal(gemm.linear(x[37:52], weights), gemm.linear(x, weights)[37:52])


@compiled
def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    x, weights, grad = layer(30, 47, (33, 8), torch.float32)
    sound = all_three(x, weights, grad)
    x[3, 46], grad[5, 40], weights[1][7, 2] = torch.nan, torch.inf, -torch.inf  # ends of odd sums
    outputs, inputs, weight = all_three(x, weights, grad)
    other = torch.arange(30) != 3
    assert outputs[3].isnan().all() and torch.equal(outputs[other, :40], sound[0][other, :40])
    assert not outputs[other, 40].isfinite().any()
    columns = torch.arange(47) != 2
    assert inputs[5].isfinite().logical_not().all() and not inputs[:, 2].isfinite().any()
    assert torch.equal(inputs[torch.arange(30) != 5][:, columns], sound[1][torch.arange(30) != 5][:, columns])
    assert weight[:, 46].isnan().all() and not weight[40].isfinite().any()
    assert torch.equal(weight[:40, :46], sound[2][:40, :46])


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_and_the_smallest_numbers(dtype: torch.dtype) -> None:
    largest, smallest = torch.finfo(torch.bfloat16).max, 1e-39
    weights = [torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0], [smallest, smallest]], dtype=dtype)]
    x = torch.tensor([[largest, largest], [smallest, 1.0]]).bfloat16()
    found = gemm.linear(x, weights, dtype=torch.float32)
    assert found[0, :3].tolist() == [largest, torch.inf, -torch.inf]
    assert 0 <= float(found[0, 3]) < 1 and found[1, 1:3].tolist() == [1.0, -1.0]
    assert found[1, [0, 3]].abs().max() < 1e-38  # what is not a normal number may count as zero
    rounded = gemm.linear(x[1:], [torch.tensor([[0.0, 1 + 2**-8], [0.0, 1 + 3 * 2**-8]])])
    assert rounded.tolist() == [[1.0, 1 + 2**-6]]  # ties to even, as weights are rounded elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_types_are_plain_products(dtype: torch.dtype) -> None:
    x, weights, grad = layer(9, 20, (5, 8), torch.float32)
    x, grad, bias = x.to(dtype), grad.to(dtype), [normal(5), None]
    matrix, added = torch.cat(weights).to(dtype), torch.cat((normal(5), torch.zeros(8))).to(dtype)
    close = {"rtol": 3e-3, "atol": 3e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(gemm.linear(x, weights, bias), x @ matrix.t() + added, **close)
    torch.testing.assert_close(gemm.input_gradient(grad, weights), grad @ matrix, **close)
    out = normal(13, 20)
    expected = out + (grad.t() @ x).float()
    assert gemm.weight_gradient(grad, x, out) is out
    torch.testing.assert_close(out, expected, **close)


def test_plain_products_are_right_in_bfloat16() -> None:
    x, weights, grad = layer(40, 64, (33, 7), torch.float32)
    matrix, bias = joint(weights), [normal(33), None]
    added = torch.cat((normal(33), torch.zeros(7))).bfloat16()
    close = {"rtol": 0.02, "atol": 0.02}
    exact = x.double() @ matrix.double().t() + added
    torch.testing.assert_close(gemm.plain_linear(x, weights, bias, torch.float32).double(), exact, **close)
    exact = grad.double() @ matrix.double()
    torch.testing.assert_close(gemm.plain_input_gradient(grad, weights).double(), exact, **close)
    exact = grad.double().t() @ x.double()
    torch.testing.assert_close(gemm.plain_weight_gradient(grad, x).double(), exact, **close)


def test_where_nothing_is_compiled_products_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_product", lambda: None)  # private: what every call asks
    x, weights, grad = layer(40, 64, (33, 7), torch.float32)
    plain = gemm.plain_linear(x, weights, None, torch.bfloat16)
    assert not gemm.available() and torch.equal(gemm.linear(x, weights), plain)
    assert torch.equal(gemm.input_gradient(grad, weights), gemm.plain_input_gradient(grad, weights))
    assert torch.equal(gemm.weight_gradient(grad, x), gemm.plain_weight_gradient(grad, x))


def test_nothing_times_something() -> None:
    x, weights, grad = layer(0, 20, (5, 8), torch.float32)
    assert gemm.linear(x, weights).shape == (0, 13) and gemm.input_gradient(grad, weights).shape == (0, 20)
    assert torch.equal(gemm.weight_gradient(grad, x), torch.zeros(13, 20))

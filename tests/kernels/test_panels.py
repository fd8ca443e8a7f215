"""Products with panels: torch's numbers, a row's bits in any company, and the matrix itself bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels import panels
from puna.kernels.library import load

pytestmark = pytest.mark.skipif(load("panels").functions is None, reason=load("panels").fault)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(32, 2), (1, 64), (31, 30), (33, 100), (96, 288), (172, 64), (320, 5000)]  # (O, I)
ROWS = [0, 1, 2, 3, 4, 5, 7, 13, 14, 15, 16, 29, 64, 113, 230]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exactly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_matrix_comes_back_bit_for_bit(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = normal(outputs, inputs).to(dtype)
    packed = panels.into_panels(weight)
    words = panels._words(packed)
    plain = torch.full_like(words, 7)
    panels.plain_fill(panels._words(weight.unflatten(1, (-1, packed.shape[3]))), plain)  # private: its twin
    assert torch.equal(words, plain)
    assert packed.is_contiguous() and torch.equal(panels.out_of_panels(packed, outputs), weight)
    odd = torch.cat((weight.flatten()[:1], weight.flatten()))[1:].view(outputs, inputs)
    assert torch.equal(panels.into_panels(odd), packed)  # wherever it begins in memory
    assert torch.equal(panels.into_panels(weight.t().contiguous().t()), packed)
    which = torch.randint(outputs, (2, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(panels.outputs_of(packed, which), weight[which])
    assert torch.equal(panels.plain_outputs_of(packed, which), weight[which])
    assert torch.equal(panels.outputs_of(packed, which.t().int()), weight[which.t()])
    with pytest.raises(IndexError):
        panels.outputs_of(packed, torch.tensor([10**6]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_right_to_the_rounding_of_their_type(
    outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype
) -> None:
    weight, x = normal(outputs, inputs).to(dtype), normal(5, 3, inputs, seed=1).to(dtype)
    bias = normal(outputs, seed=2).to(dtype) if with_bias else None
    found = panels.multiply(x, panels.into_panels(weight), bias, outputs)
    expected = exactly(x, weight, bias)
    terms = F.linear(x.double().abs(), weight.double().abs()) + 1
    error = (found.double() - expected).abs()
    assert found.dtype == dtype and found.shape == (5, 3, outputs)
    assert (error <= terms * inputs * 2**-24 + expected.abs() * torch.finfo(dtype).eps / 2).all()
    assert torch.allclose(
        found, panels.plain(x, panels.into_panels(weight), bias, outputs), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Inputs are pairs that nearly cancel, so that what is left of a sum shows the order it was added in."""
    weight, x = normal(outputs, inputs).to(dtype), normal(max(ROWS), inputs, seed=1).to(dtype)
    pairs = inputs // 2
    weight[:, pairs : 2 * pairs] = weight[:, :pairs]
    x[:, pairs : 2 * pairs] = -x[:, :pairs] * (1 + 2 * torch.finfo(dtype).eps)
    packed = panels.into_panels(weight)
    alone = torch.cat([panels.multiply(row[None], packed, None, outputs) for row in x])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            first = max(ROWS) - rows
            assert torch.equal(panels.multiply(x[first:], packed, None, outputs), alone[first:])


@pytest.mark.parametrize("heights", [(32, 64, 32), (32, 64, 5), (33, 7, 64)])
def test_several_matrices_are_one(heights: tuple[int, ...]) -> None:
    weights = [normal(height, 20, seed=height).to(torch.bfloat16) for height in heights]
    packed = panels.into_panels(*weights)
    assert torch.equal(packed, panels.into_panels(torch.cat(weights)))
    assert torch.equal(panels.out_of_panels(packed, sum(heights)), torch.cat(weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_stay_in_their_row(dtype: torch.dtype) -> None:
    weight, x = normal(40, 64).to(dtype), normal(6, 64, seed=1).to(dtype)
    packed = panels.into_panels(weight)
    sound = panels.multiply(x, packed, None, 40)
    x[2, 5], x[4, 63] = torch.inf, torch.nan
    found = panels.multiply(x, packed, None, 40)
    assert torch.equal(found[[0, 1, 3, 5]], sound[[0, 1, 3, 5]])
    assert found[2].isinf().all() and found[4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_overflow_as_they_should(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x, weight = torch.tensor([[largest, 0.0], [largest, largest]], dtype=dtype), torch.ones(1, 2, dtype=dtype)
    found = panels.multiply(x, panels.into_panels(weight), None, 1)
    assert found.flatten().tolist() == [largest, torch.inf]


def test_gradients_reach_the_input() -> None:
    weight, x = normal(48, 24), normal(7, 24, seed=1).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    panels.multiply(x, panels.into_panels(weight), None, 48).square().sum().backward()
    F.linear(reference, weight).square().sum().backward()
    assert x.grad is not None and reference.grad is not None
    assert torch.allclose(x.grad, reference.grad, rtol=1e-4, atol=1e-4)


def test_what_the_compiled_product_does_not_take_is_left_alone() -> None:
    assert not panels.suits(normal(32, 33).to(torch.bfloat16))
    assert not panels.suits(normal(32, 32).double())
    assert not panels.suits(torch.empty(32, 32, device="meta"))
    assert panels.suits(normal(32, 33)) and panels.suits(normal(1, 2).to(torch.bfloat16))


def test_panels_moved_to_another_type_still_give_the_product() -> None:
    weight, x = normal(40, 64), normal(3, 64, seed=1)
    packed = panels.into_panels(weight.to(torch.bfloat16))
    found = panels.multiply(x, packed.float(), None, 40)
    assert torch.equal(found, F.linear(x, weight.to(torch.bfloat16).float()))

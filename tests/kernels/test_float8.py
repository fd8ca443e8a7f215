"""Products of 8 bits, on the CPU, where torch computes them one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.kernels import float8, gemm

ROWS, INPUTS, HEIGHTS = 48, 64, (32, 16)


def exact(x: Tensor) -> Tensor:
    """What the rounded numbers stand for."""
    numbers, scale = float8.rounded(x)
    return numbers.double() * scale.double()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-6, 3, shape[0])[:, None]  # lines of very different size
    return (torch.randn(*shape, generator=source) * spread).bfloat16()


def near(found: Tensor, expected: Tensor, bits: int = 8) -> None:
    """Within the rounding of a result of so many bits, line by line."""
    scale = expected.abs().amax(dim=1, keepdim=True)
    assert ((found.double() - expected).abs() <= 2.0 ** -(bits - 1) * scale).all()


def test_products_are_those_of_the_rounded_numbers() -> None:
    x, weights = drawn(ROWS, INPUTS), [drawn(o, INPUTS, seed=o).float() for o in HEIGHTS]
    joint = torch.cat(weights)
    bias = [torch.randn(o) for o in HEIGHTS]
    near(float8.linear(x, weights), exact(x) @ exact(joint).t())
    expected = (exact(x) @ exact(joint).t()).bfloat16().double() + torch.cat(bias).double()
    near(float8.linear(x, weights, bias), expected)
    grad = drawn(ROWS, sum(HEIGHTS), seed=1)
    near(float8.input_gradient(grad, weights), exact(grad) @ exact(joint.t()).t())
    summed = exact(grad.t()) @ exact(x.t()).t()
    found = float8.weight_gradient(grad, x)
    assert found.dtype == torch.float32
    near(found, summed)
    held = torch.ones(sum(HEIGHTS), INPUTS)
    assert float8.weight_gradient(grad, x, held) is held
    assert torch.equal(held, found + 1)


@pytest.mark.parametrize("rows", [1, 31, 33])
def test_rows_that_16_does_not_divide_are_filled_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device refuses sums over any other number of rows."""
    grad, x = drawn(rows, 48, seed=1), drawn(rows, INPUTS)
    sums: list[int] = []
    product = float8._product

    def noted(left: Tensor, right: Tensor) -> Tensor:
        sums.append(left.shape[1])
        return product(left, right)

    monkeypatch.setattr(float8, "_product", noted)
    near(float8.weight_gradient(grad, x), exact(grad.t()) @ exact(x.t()).t())
    assert sums == [-(-rows // 16) * 16]


def test_they_are_as_near_to_products_in_bfloat16_as_three_bits_allow() -> None:
    x, weights = torch.randn(ROWS, INPUTS).bfloat16(), [torch.randn(o, INPUTS) for o in HEIGHTS]
    plain = gemm.plain_linear(x, weights, None, torch.bfloat16).float()
    error = (float8.linear(x, weights).float() - plain).norm() / plain.norm()
    assert 0.005 < error < 0.05


def test_rounding_keeps_the_largest_number_and_lines_of_zeros() -> None:
    x = torch.tensor([[0.0] * 16, [3.0] + [0.001] * 15])
    numbers, scale = float8.rounded(x)
    assert torch.equal(numbers[0].float(), torch.zeros(16))
    assert float(numbers[1, 0]) == float8.LARGEST
    assert float(numbers[1, 0]) * float(scale[1, 0]) == pytest.approx(3.0, rel=1e-6)


def test_a_cpu_has_no_units_for_them() -> None:
    assert not float8.multiplies_float8(torch.device("cpu"))

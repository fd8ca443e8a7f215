"""SwiGLU's gate in a layer that learns: torch's numbers, forward and backward, and the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels import gates
from puna.kernels.library import load

compiled = pytest.mark.skipif(load("gates").functions is None, reason=load("gates").fault)
WIDTHS = [1, 5, 16, 64, 172, 768]
R = 131  # three blocks of rows, the last one short


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def material(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A gradient (R, F), and gates beside what they let through (R, 2F)."""
    return normal(R, width, seed=0).to(dtype), (3 * normal(R, 2 * width, seed=1)).to(dtype)


def by_autograd(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, and the product, by the formula that the model's MLP has."""
    given = gate_up.clone().requires_grad_()
    gate, up = given.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return torch.autograd.grad(product, given, grad)[0], product.detach()


@pytest.mark.parametrize("width", WIDTHS)
def test_plain_is_autograds_in_float64(width: int) -> None:
    grad, gate_up = material(width, torch.float64)
    for found, wanted in zip(
        gates.plain_swiglu_backward(grad, gate_up), by_autograd(grad, gate_up), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@compiled
@pytest.mark.parametrize("width", WIDTHS)
def test_float32_is_autograds(width: int) -> None:
    grad, gate_up = material(width, torch.float32)
    found, product = gates.swiglu_backward(grad, gate_up)
    wanted, wanted_product = by_autograd(grad.double(), gate_up.double())
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(product.double(), wanted_product, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(gates.swiglu(gate_up), product, rtol=1e-6, atol=1e-12)


@compiled
@pytest.mark.parametrize("width", WIDTHS)
def test_bfloat16_has_the_models_bits_forward_and_float32s_gradients(width: int) -> None:
    grad, gate_up = material(width, torch.bfloat16)
    found, product = gates.swiglu_backward(grad, gate_up)
    _, wanted_product = by_autograd(grad, gate_up)
    # An exponential's last bit now and then moves a number across a rounding.
    for each in (product, gates.swiglu(gate_up)):
        assert (each != wanted_product).double().mean() < 2e-3
        torch.testing.assert_close(each, wanted_product, rtol=2**-7, atol=0)
    exact, _ = by_autograd(grad.double(), gate_up.double())
    unit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found.double(), exact, rtol=unit, atol=1e-6)
    assert found.dtype == product.dtype == torch.bfloat16


class Gate(torch.autograd.Function):
    """The kernel's product, differentiable by its backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gates.swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return gates.swiglu_backward(grads[0], *ctx.saved_tensors)[0]


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(Gate.apply, (normal(3, 10, seed=0).requires_grad_(),))


@compiled
@pytest.mark.parametrize("dtype", gates.DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    grad, gate_up = material(1025, dtype)
    torch.set_num_threads(1)
    alone = gates.swiglu_backward(grad, gate_up)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, alone, gates.swiglu_backward(grad, gate_up)))


@compiled
@pytest.mark.parametrize("dtype", gates.DTYPES, ids=str)
def test_gates_of_any_size_and_rows_that_lie_apart(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1e-8, -1e-8, 20.0, -20.0, 88.0, -88.0, 60000.0, -60000.0, torch.inf, torch.nan]
    gate_up = torch.tensor([[*values, *[2.0] * len(values)]] * 4, dtype=dtype)[::2]
    grad = torch.full((2, 2 * len(values)), 0.5, dtype=dtype)[:, 1::2]
    for found, wanted in zip(
        gates.swiglu_backward(grad, gate_up), gates.plain_swiglu_backward(grad, gate_up), strict=True
    ):
        close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-30, "equal_nan": True}
        torch.testing.assert_close(found, wanted, **close)  # type: ignore[arg-type]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)


@compiled
def test_what_does_not_fit_together_is_not_read() -> None:
    grad, gate_up = material(48, torch.float32)
    for wrong in (gate_up[1:], gate_up[:, 1:]):
        with pytest.raises(AssertionError):
            gates.swiglu_backward(grad, wrong)


def test_types_that_are_not_compiled_for_go_by_torch() -> None:
    grad, gate_up = material(48, torch.float16)
    for found, wanted in zip(
        gates.swiglu_backward(grad, gate_up), gates.plain_swiglu_backward(grad, gate_up), strict=True
    ):
        assert torch.equal(found, wanted)

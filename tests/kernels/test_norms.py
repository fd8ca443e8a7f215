"""The norm of a layer that learns: the model's own numbers, forward and backward, and the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.kernels import norms
from puna.kernels.library import load
from puna.model.llama import RMSNorm

compiled = pytest.mark.skipif(load("norms").functions is None, reason=load("norms").fault)
WIDTHS = [1, 5, 16, 48, 64, 172, 288]
R, EPS = 131, 1e-5  # three blocks of rows, the last one short


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def material(width: int, stream: torch.dtype, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": 3 * normal(R, width, seed=0, dtype=stream),
        "delta": normal(R, width, seed=1, dtype=dtype),
        "weight": 1 + normal(width, seed=2, dtype=stream) / 5,
        "grad_y": normal(R, width, seed=3, dtype=dtype),
        "grad_total": normal(R, width, seed=4, dtype=stream),
    }


def by_autograd(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """x + delta, the module's norm of it, and the gradients of the sum, the module's weight."""
    norm = RMSNorm(given["weight"].numel(), EPS).to(given["x"].dtype)
    norm.weight.data = given["weight"]
    total = (given["x"] + given["delta"]).requires_grad_()
    y = norm(total)
    ends = (y.to(given["grad_y"].dtype), total)
    grads = torch.autograd.grad(ends, (total, norm.weight), (given["grad_y"], given["grad_total"]))
    return total.detach(), ends[0].detach(), *grads


def by_hand(given: dict[str, Tensor], plain: bool = False) -> tuple[Tensor, ...]:
    prefix = "plain_" if plain else ""
    forward, backward = (getattr(norms, prefix + n) for n in ("add_rms_norm", "rms_norm_backward"))
    dtype = given["grad_y"].dtype
    total, y, rstd = forward(given["x"], given["delta"], given["weight"], EPS, dtype)
    grad, rounded, again, grad_weight = backward(
        given["grad_y"], total, rstd, given["weight"], given["grad_total"], again=True
    )
    assert torch.equal(again, y) and torch.equal(rounded, grad.to(dtype))
    return total, y, grad, grad_weight


@pytest.mark.parametrize("width", WIDTHS)
def test_plain_is_the_module_and_its_gradients_in_float64(width: int) -> None:
    given = material(width, torch.float64, torch.float64)
    for found, wanted in zip(by_hand(given, plain=True), by_autograd(given), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@compiled
@pytest.mark.parametrize("width", WIDTHS)
def test_float32_is_the_module_and_its_gradients(width: int) -> None:
    given = material(width, torch.float32, torch.float32)
    exact = by_autograd({name: each.double() for name, each in given.items()})
    for found, wanted in zip(by_hand(given), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6 * wanted.abs().max().item())


@compiled
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_has_the_modules_bits_forward_and_float32s_gradients(
    width: int, stream: torch.dtype
) -> None:
    given = material(width, stream, torch.bfloat16)
    total, y, grad, grad_weight = by_hand(given)
    wanted_total, wanted_y, *_ = by_autograd(given)
    assert torch.equal(total, wanted_total)
    # The squares are summed in another order; now and then that moves a number across a rounding.
    assert (y != wanted_y).double().mean() < 2e-3
    torch.testing.assert_close(y, wanted_y, rtol=2**-7, atol=0)

    wide = {name: each.double() for name, each in given.items()} | {"x": total.double()}
    _, _, exact, exact_weight = by_autograd(wide | {"delta": torch.zeros_like(wide["x"])})
    unit = torch.finfo(stream).eps
    torch.testing.assert_close(grad.double(), exact, rtol=unit, atol=4e-6 * exact.abs().max().item())
    # Products with the norm, which is rounded in the stream's type: as many roundings as rows.
    bound = unit * (given["grad_y"].double() * y.double()).abs().sum(dim=0) + 1e-5
    assert ((grad_weight.double() - exact_weight).abs() <= bound).all()
    assert grad.dtype == grad_weight.dtype == stream and y.dtype == torch.bfloat16


@compiled
@pytest.mark.parametrize("types", norms.TYPES, ids=str)
def test_nothing_added_and_nothing_past_the_norm(types: tuple[torch.dtype, torch.dtype]) -> None:
    given = material(172, *types)
    x, weight, grad_y = given["x"], given["weight"], given["grad_y"]
    y, rstd = norms.rms_norm(x, weight, EPS, types[1])
    total, same, scales = norms.add_rms_norm(x, torch.zeros_like(grad_y), weight, EPS, types[1])
    assert torch.equal(total, x) and torch.equal(y, same) and torch.equal(rstd, scales)
    assert rstd.dtype == torch.float32
    grad, rounded, again, grad_weight = norms.rms_norm_backward(grad_y, x, rstd, weight, None, again=False)
    assert again is None and (rounded is grad) == (types[0] == types[1])
    zero = torch.zeros_like(x)
    more = norms.rms_norm_backward(grad_y, x, rstd, weight, zero, again=True)
    assert torch.equal(more[0], grad) and torch.equal(more[3], grad_weight)


class Norm(torch.autograd.Function):
    """Both results of the kernel, differentiable by its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total, y, rstd = norms.add_rms_norm(x, delta, weight, EPS, x.dtype)
        ctx.save_for_backward(total, rstd, weight)
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, rstd, weight = ctx.saved_tensors
        grad, _, _, grad_weight = norms.rms_norm_backward(
            grads[1], total, rstd, weight, grads[0], again=False
        )
        return grad, grad, grad_weight


def test_gradcheck() -> None:
    given = [normal(3, 5, seed=0), normal(3, 5, seed=1), normal(5, seed=2)]
    assert torch.autograd.gradcheck(Norm.apply, [each.requires_grad_() for each in given])


@compiled
@pytest.mark.parametrize("types", norms.TYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(types: tuple[torch.dtype, torch.dtype]) -> None:
    given = material(1025, *types)
    torch.set_num_threads(1)
    alone = by_hand(given)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, alone, by_hand(given)))


@compiled
@pytest.mark.parametrize("types", norms.TYPES, ids=str)
def test_rows_that_lie_apart_and_numbers_of_any_size(types: tuple[torch.dtype, torch.dtype]) -> None:
    x = torch.tensor([[1e18, -1e18], [1e-20, 1e-20], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    x = torch.cat((x, x), dim=1).to(types[0])[:, 1:3]  # (5, 2), not contiguous
    weight, grad_y = torch.ones(2, dtype=types[0]), torch.ones(5, 2, dtype=types[1])
    y, rstd = norms.rms_norm(x, weight, EPS, types[1])
    plain_y, plain_rstd = norms.plain_rms_norm(x, weight, EPS, types[1])
    torch.testing.assert_close(rstd, plain_rstd, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(y, plain_y, rtol=1e-6, atol=1e-30, equal_nan=True)
    found = norms.rms_norm_backward(grad_y, x, rstd, weight, None, again=True)
    wanted = norms.plain_rms_norm_backward(grad_y, x, rstd, weight, None, again=True)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4, equal_nan=True)


@compiled
def test_what_does_not_fit_together_is_not_read() -> None:
    given = material(48, torch.float32, torch.float32)
    x, weight, grad_y, rstd = given["x"], given["weight"], given["grad_y"], torch.ones(R)
    with pytest.raises(AssertionError):
        norms.rms_norm(x, weight[1:], EPS, torch.float32)
    with pytest.raises(AssertionError):
        norms.add_rms_norm(x, given["delta"][1:], weight, EPS, torch.float32)
    for wrong in ((grad_y[1:], rstd), (grad_y, rstd[1:]), (grad_y, rstd.double())):
        with pytest.raises(AssertionError):
            norms.rms_norm_backward(wrong[0], x, wrong[1], weight, None, again=True)


def test_types_that_are_not_compiled_for_go_by_torch() -> None:
    given = material(48, torch.float32, torch.float16)
    for found, wanted in zip(by_hand(given), by_hand(given, plain=True), strict=True):
        assert torch.equal(found, wanted)

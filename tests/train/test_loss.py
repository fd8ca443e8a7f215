"""The chunked loss of the head against the definition, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from puna.errors import PunaError
from puna.kernels import gemm
from puna.train import loss as losses
from puna.train.loss import SMALLEST_CHUNK, cross_entropy_sum, head_loss, head_losses
from puna.train.objectives import language_modelling
from tests.train.tiny import TinySource, tiny_model

D, V = 6, 1009
R = 2 * SMALLEST_CHUNK + 45  # three chunks, the last one short
Z = 1e-2


@pytest.fixture(autouse=True)
def _three_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", SMALLEST_CHUNK * V)


@pytest.fixture(params=["matrix", "module"])
def head(request: pytest.FixtureRequest) -> nn.Linear:
    """A plain matrix has products of its own; one with a bias is any module."""
    torch.manual_seed(0)
    return nn.Linear(D, V, bias=request.param == "module").double()


def rows() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(1, R, D, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randint(0, V, (1, R)), torch.rand(1, R) < 0.7


def by_definition(head: nn.Module, hidden: Tensor, targets: Tensor, mask: Tensor, z: float = 0.0) -> Tensor:
    logits = head(hidden)
    sums = logits.exp().sum(-1, keepdim=True).log()
    loss = (sums - logits).gather(-1, targets[..., None])[..., 0][mask].sum()
    return loss + z * sums[mask].square().sum()


@pytest.mark.parametrize("z", [0.0, Z])
def test_loss_and_gradients_are_those_of_the_definition(head: nn.Linear, z: float) -> None:
    hidden, targets, mask = rows()
    wanted = by_definition(head, hidden, targets, mask, z)
    gradients = torch.autograd.grad(wanted, [hidden, *head.parameters()])

    loss, penalty = head_losses(head, hidden, targets, mask, z)
    (loss * 0.25).backward()

    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(penalty, wanted - by_definition(head, hidden, targets, mask))
    assert not penalty.requires_grad
    for tensor, gradient in zip([hidden, *head.parameters()], gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient * 0.25, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("z", [0.0, Z])
def test_without_gradients_the_sum_is_the_same(head: nn.Linear, z: float) -> None:
    hidden, targets, mask = rows()
    with torch.no_grad():
        found = head_loss(head, hidden, targets, mask, z)
        assert found == head_loss(head, hidden, targets, mask, z)
        wanted = by_definition(head, hidden, targets, mask, z)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert found == head_loss(head, hidden, targets, mask, z)


def test_masked_positions_give_no_gradient_whatever_their_target(head: nn.Linear) -> None:
    hidden, targets, mask = rows()
    targets[~mask] = 5
    head_loss(head, hidden, targets, mask).backward()
    assert hidden.grad is not None
    assert (hidden.grad[~mask] == 0).all()
    assert (hidden.grad[mask] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_learn_is_zero_and_not_nan(head: nn.Linear, dtype: torch.dtype) -> None:
    hidden, targets, mask = rows()
    hidden, head = hidden.detach().to(dtype).requires_grad_(), head.to(dtype)
    loss = head_loss(head, hidden, targets, torch.zeros_like(mask), Z)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
    assert (head.weight.grad == 0).all()


def test_only_what_requires_gradients_receives_them(head: nn.Linear) -> None:
    """An adapted head: a frozen matrix with a small one before it that is trained."""
    hidden, targets, mask = rows()
    adapted = nn.Sequential(nn.Linear(D, D, bias=False).double(), head.requires_grad_(False))
    wanted = torch.autograd.grad(by_definition(adapted, hidden, targets, mask), adapted[0].weight)[0]
    head_loss(adapted, hidden, targets, mask).backward()
    assert head.weight.grad is None
    torch.testing.assert_close(adapted[0].weight.grad, wanted, rtol=1e-10, atol=1e-14)


def test_no_gradient_is_formed_of_a_frozen_matrix_or_of_hidden_states_nobody_learns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = nn.Linear(D, V, bias=False).double()
    hidden, targets, mask = rows()
    wanted = torch.autograd.grad(
        by_definition(head, hidden, targets, mask), [hidden, head.weight], retain_graph=True
    )
    with monkeypatch.context() as patch:
        patch.delattr(gemm, "weight_gradient")
        head_loss(head.requires_grad_(False), hidden, targets, mask).backward()
        assert head.weight.grad is None
        torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-10, atol=1e-14)
    monkeypatch.delattr(gemm, "input_gradient")
    head_loss(head.requires_grad_(True), hidden.detach(), targets, mask).backward()
    torch.testing.assert_close(head.weight.grad, wanted[1], rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        monkeypatch.delattr(gemm, "weight_gradient")
        assert head_loss(head, hidden, targets, mask) > 0


def test_a_second_backward_pass_is_refused() -> None:
    head = nn.Linear(D, V, bias=False).double()
    loss = head_loss(head, *rows())
    loss.backward(retain_graph=True)
    with pytest.raises(PunaError, match=r"got a second: .* compute the loss once more"):
        loss.backward()


def test_gradients_of_several_losses_add_up() -> None:
    head = nn.Linear(D, V, bias=False).double()
    hidden, targets, mask = rows()
    wanted = torch.autograd.grad(2 * by_definition(head, hidden, targets, mask), head.weight)[0]
    for _ in range(2):
        head_loss(head, hidden, targets, mask).backward()
    torch.testing.assert_close(head.weight.grad, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_formed_in_autocasts_type_and_sums_in_float32(dtype: torch.dtype) -> None:
    head = nn.Linear(64, V, bias=False)
    torch.manual_seed(0)
    hidden = torch.randn(R, 64, requires_grad=True)
    _, targets, mask = rows()
    targets, mask = targets[0], mask[0]
    exact = by_definition(head.double(), hidden.double(), targets, mask, Z)
    wanted = torch.autograd.grad(exact, [hidden, head.weight])
    head = head.float()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = head_loss(head, hidden, targets, mask, Z)
    loss.backward()
    unit = torch.finfo(dtype).eps
    assert loss.dtype == hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=max(unit / 10, 1e-6))
    for found, expected in zip((hidden.grad, head.weight.grad), wanted, strict=True):
        assert (found - expected).norm() < max(unit, 2e-6) * expected.norm()


def test_the_same_bits_at_every_run() -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, V, bias=False)
    hidden = torch.randn(R, 64, requires_grad=True)
    targets, mask = rows()[1].flatten(), rows()[2].flatten()
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = head_loss(head, hidden, targets, mask, Z)
        found.append((loss, *torch.autograd.grad(loss, (hidden, head.weight))))
    assert all(map(torch.equal, *found))


def test_a_model_all_in_bfloat16() -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, V, bias=False).bfloat16()
    hidden = torch.randn(1, R, 64).bfloat16().requires_grad_()
    _, targets, mask = rows()
    wide = nn.Linear(64, V, bias=False).double()
    wide.weight.data = head.weight.data.double()
    given = hidden.detach().double().requires_grad_()
    exact = by_definition(wide, given, targets, mask)
    loss = head_loss(head, hidden, targets, mask)
    (loss / R).backward()
    (exact / R).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for found, wanted in ((hidden.grad, given.grad), (head.weight.grad, wide.weight.grad)):
        assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.01 * wanted.norm()


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.made.append(each.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_the_logits_of_all_rows_nor_a_second_matrix_is_ever_in_memory(
    dtype: torch.dtype,
) -> None:
    # Larger than the logits of a chunk and than hidden states, smaller than the logits of all rows.
    width, count = 2 * SMALLEST_CHUNK, 3 * SMALLEST_CHUNK
    head = nn.Linear(width, V, bias=False)
    hidden = torch.randn(count, width, requires_grad=True)
    targets, mask = torch.randint(0, V, (count,)), torch.ones(count, dtype=torch.bool)
    with Sizes() as sizes, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = head_loss(head, hidden, targets, mask, Z)
        (loss * 0.5).backward()
    matrices = [made for made in sizes.made if made > max(SMALLEST_CHUNK * V, count * width)]
    assert matrices == [width * V]
    assert head.weight.grad is not None and hidden.grad is not None


def test_the_matrix_keeps_the_gradient_that_was_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd copies a gradient that someone else still holds."""
    made: list[int] = []
    zeros_like = torch.zeros_like

    def noted(*given: Any, **more: Any) -> Tensor:
        found = zeros_like(*given, **more)
        made.append(found.data_ptr())
        return found

    monkeypatch.setattr(torch, "zeros_like", noted)
    head = nn.Linear(600, V, bias=False)
    hidden = torch.randn(40, 600, requires_grad=True)
    head_loss(head, hidden, torch.arange(40), torch.ones(40, dtype=torch.bool)).backward()
    assert head.weight.grad is not None and head.weight.grad.data_ptr() in made


@pytest.mark.parametrize(("vocabulary", "rows"), [(32_000, 512), (128_256, 256), (200_000, 256)])
def test_rows_of_a_chunk(vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert losses._rows_of(vocabulary) == rows


def test_half_precision_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(400, 50)).bfloat16()
    targets, mask = torch.randint(0, 50, (400,)), torch.ones(400, dtype=torch.bool)
    loss = cross_entropy_sum(logits, targets, mask)
    assert loss.dtype == torch.float32
    wanted = by_definition(nn.Identity(), logits.double(), targets, mask)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_penalty_is_part_of_the_loss_and_told() -> None:
    model, batch = tiny_model(dtype=torch.float64), next(TinySource().steps(0)).batches[0]
    loss, count, others = language_modelling(model, batch)
    assert others == {}
    total, same, told = language_modelling(model, batch, z=Z)
    logits = model(batch.tokens, batch.positions)[batch.loss_mask]
    penalty = Z * logits.logsumexp(-1).square().sum()
    assert int(count) == int(same) and list(told) == ["z_loss"]
    torch.testing.assert_close(told["z_loss"], penalty.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(total, loss + penalty, rtol=1e-12, atol=0)


def test_a_matrix_in_bfloat16_is_summed_in_float32_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_rows_of", lambda vocabulary: 4)
    torch.manual_seed(0)
    head = nn.Linear(24, 40, bias=False).bfloat16()
    hidden = (1 + torch.randn(2048, 24)).bfloat16()
    targets, mask = torch.randint(0, 40, (2048,)), torch.ones(2048, dtype=torch.bool)
    head_loss(head, hidden, targets, mask).backward()
    exact = head.weight.detach().double().requires_grad_()
    cross_entropy_sum(hidden.double() @ exact.t(), targets, mask).backward()
    found = head.weight.grad
    assert found is not None and exact.grad is not None and found.dtype == torch.bfloat16
    assert (found.double() - exact.grad).norm() < 0.006 * exact.grad.norm()


def test_a_module_in_bfloat16_is_summed_in_float32_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_rows_of", lambda vocabulary: 8)
    torch.manual_seed(0)
    head = nn.Linear(24, 40).bfloat16()
    hidden = (1 + torch.randn(2048, 24)).bfloat16()
    targets, mask = torch.randint(0, 40, (2048,)), torch.ones(2048, dtype=torch.bool)
    head_loss(head, hidden, targets, mask).backward()
    weight, bias = (each.detach().double().requires_grad_() for each in (head.weight, head.bias))
    cross_entropy_sum(hidden.double() @ weight.t() + bias, targets, mask).backward()
    for found, exact in ((head.weight.grad, weight.grad), (head.bias.grad, bias.grad)):
        assert found is not None and exact is not None and found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_no_rows_have_no_loss() -> None:
    head = nn.Linear(8, 12, bias=False)
    hidden = torch.zeros(0, 8, requires_grad=True)
    loss = head_loss(head, hidden, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert head.weight.grad is not None and not head.weight.grad.any()

"""The chunked loss of the head against the definition, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from puna.train.loss import CHUNK_NUMBERS, SMALLEST_CHUNK, cross_entropy_sum, head_loss

D, V = 6, 20_011
R = 2 * SMALLEST_CHUNK + 45  # three chunks, the last one short
assert CHUNK_NUMBERS // V < SMALLEST_CHUNK


def material() -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=True).double()
    hidden = torch.randn(1, R, D, dtype=torch.float64, requires_grad=True)
    return head, hidden, torch.randint(0, V, (1, R)), torch.rand(1, R) < 0.7


def by_definition(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    logits = head(hidden)
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    return -logs.gather(-1, targets[..., None])[..., 0][mask].sum()


def test_loss_and_gradients_are_those_of_the_definition() -> None:
    head, hidden, targets, mask = material()
    wanted = by_definition(head, hidden, targets, mask)
    gradients = torch.autograd.grad(wanted, [hidden, *head.parameters()])

    loss = head_loss(head, hidden, targets, mask)
    (loss * 0.25).backward()

    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for tensor, gradient in zip([hidden, *head.parameters()], gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient * 0.25, rtol=1e-10, atol=1e-14)


def test_without_gradients_the_sum_is_the_same() -> None:
    head, hidden, targets, mask = material()
    with torch.no_grad():
        assert head_loss(head, hidden, targets, mask) == head_loss(head, hidden, targets, mask)
        torch.testing.assert_close(
            head_loss(head, hidden, targets, mask),
            by_definition(head, hidden, targets, mask),
            rtol=1e-12,
            atol=0,
        )


def test_masked_positions_give_no_gradient_whatever_their_target() -> None:
    head, hidden, targets, mask = material()
    targets[~mask] = 5
    head_loss(head, hidden, targets, mask).backward()
    assert hidden.grad is not None
    assert (hidden.grad[~mask] == 0).all()
    assert (hidden.grad[mask] != 0).any(-1).all()


def test_nothing_to_learn_is_zero_and_not_nan() -> None:
    head, hidden, targets, mask = material()
    loss = head_loss(head, hidden, targets, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
    assert (head.weight.grad == 0).all()


def test_only_what_requires_gradients_receives_them() -> None:
    """An adapted head: a frozen matrix with a small one before it that is trained."""
    head, hidden, targets, mask = material()
    adapted = nn.Sequential(nn.Linear(D, D, bias=False).double(), head.requires_grad_(False))
    wanted = torch.autograd.grad(by_definition(adapted, hidden, targets, mask), adapted[0].weight)[0]
    head_loss(adapted, hidden, targets, mask).backward()
    assert head.weight.grad is None
    torch.testing.assert_close(adapted[0].weight.grad, wanted, rtol=1e-10, atol=1e-14)


def test_half_precision_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(400, 50)).bfloat16()
    targets, mask = torch.randint(0, 50, (400,)), torch.ones(400, dtype=torch.bool)
    loss = cross_entropy_sum(logits, targets, mask)
    assert loss.dtype == torch.float32
    wanted = by_definition(nn.Identity(), logits.double(), targets, mask)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)

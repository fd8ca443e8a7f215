"""Gradients do not depend on how the same tokens are split, with unequal numbers of trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puna.train.gradients import accumulate, average_and_clip, known_scale
from puna.train.objectives import language_modelling
from tests.torchrun import run_in_ranks
from tests.train.tiny import ROWS, TinySource, precision, tiny_model

NO_LIMIT = 1e9


def averaged(micro_rows: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of the first step, split into micro-batches, and its loss."""
    model = tiny_model(dtype=dtype)
    batches = next(TinySource(micro_rows).steps(0)).batches
    scale = known_scale(sum(batch.tokens.numel() for batch in batches))
    seeds = range(len(batches))
    totals = accumulate(language_modelling, model, batches, precision(dtype), scale=scale, seeds=seeds)
    average_and_clip(list(model.parameters()), 1 / (scale * totals.count), NO_LIMIT)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, totals.loss


def test_the_material_is_unequal() -> None:
    counts = [batch.targets_total for batch in next(TinySource(1).steps(0)).batches]
    assert len(counts) == ROWS
    assert len(set(counts)) > 4


@pytest.mark.parametrize("micro_rows", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_every_split_has_the_same_gradient(micro_rows: int, dtype: torch.dtype, tolerance: float) -> None:
    whole, loss = averaged(ROWS, dtype)
    split, loss_of_split = averaged(micro_rows, dtype)
    assert loss_of_split == pytest.approx(loss, rel=tolerance)
    for name, gradient in whole.items():
        assert (split[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_it_is_the_gradient_of_the_mean_over_trained_tokens() -> None:
    model = tiny_model(dtype=torch.float64)
    batch = next(TinySource().steps(0)).batches[0]
    logits = model(batch.tokens, batch.positions)
    logs = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    (-logs[batch.loss_mask].mean()).backward()
    ours, _ = averaged(2, torch.float64)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-10, atol=1e-14)


def test_clipping_keeps_the_direction_and_gives_the_norm_before() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([6.0, 0.0]), torch.tensor([8.0])
    assert average_and_clip(parameters, 0.5, limit=1.0) == 5.0
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0])
    assert parameters[1].grad.tolist() == pytest.approx([0.8])


def test_a_gradient_below_the_limit_is_not_touched() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    assert average_and_clip([parameter], 1.0, limit=1.0) == pytest.approx(0.5)
    assert parameter.grad.equal(torch.tensor([0.3, 0.4]))


def test_a_gradient_that_is_not_finite_is_left_as_it_was() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([torch.inf, 1.0])
    assert average_and_clip([parameter], 0.5, limit=1.0) == torch.inf
    assert parameter.grad.tolist() == [torch.inf, 1.0]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for size in (1, 2):
        run_in_ranks(size, "-W", "error", "-m", "tests.train.two_ranks", str(tmp_path / str(size)))
    one, first, second = (
        load_file(tmp_path / name / f"rank-{rank}.safetensors")
        for name, rank in (("1", 0), ("2", 0), ("2", 1))
    )
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between ranks"
        assert (first[name] - weight).norm() <= 1e-11 * weight.norm(), name

"""Gradients do not depend on how the same tokens are split, with unequal numbers of trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puna.data.batches import Batch
from puna.model.llama import Llama
from puna.train.gradients import accumulate, clipping, gradient_norm, known_scale
from puna.train.objectives import language_modelling
from puna.train.optimizer import OptimizerSettings, build
from puna.train.precision import Precision
from tests.torchrun import run_in_ranks
from tests.train.tiny import CPU, ROWS, TinySource, precision, tiny_model


def averaged(micro_rows: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of the first step, split into micro-batches, and its loss."""
    model = tiny_model(dtype=dtype)
    batches = next(TinySource(micro_rows).steps(0)).batches
    scale = known_scale(sum(batch.tokens.numel() for batch in batches))
    seeds = range(len(batches))
    totals = accumulate(language_modelling, model, batches, precision(dtype), scale=scale, seeds=seeds)
    factor = 1 / (scale * totals.count)
    return {name: parameter.grad * factor for name, parameter in model.named_parameters()}, totals.loss


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


def test_the_norm_is_of_all_gradients_and_clipping_brings_it_to_the_limit() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, -4.0])
    assert gradient_norm(parameters) == 5.0
    assert clipping(5.0, limit=1.0) == 0.2
    assert clipping(0.5, limit=1.0) == 1.0  # a gradient below the limit is not touched
    assert clipping(0.0, limit=1.0) == 1.0


def test_a_step_is_that_of_the_averaged_and_clipped_gradient() -> None:
    weights = []
    for factor in (1.0, 0.25):
        model = tiny_model(dtype=torch.float64)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) / factor
        optimizer = build(model, OptimizerSettings(eps=1.0))  # so that the gradient's size matters
        optimizer.step(0.1, factor)
        assert all(parameter.grad is None for parameter in model.parameters())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_gradients_of_bfloat16_weights_are_added_up_in_float32() -> None:
    """256 small ones beside a large one: in bfloat16 each would vanish."""
    model = tiny_model(dtype=torch.bfloat16)
    batch = next(TinySource().steps(0)).batches[0]
    sizes = iter([1.0, *[1 / 512] * 256])

    def objective(model: Llama, batch: Batch) -> tuple[torch.Tensor, int, dict[str, torch.Tensor | float]]:
        return model.model.norm.weight.sum() * next(sizes), 1, {}

    accumulate(objective, model, [batch] * 257, Precision(CPU, torch.bfloat16, "bfloat16"), seeds=range(257))
    gradient = model.model.norm.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.unique().tolist() == [1.5]


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

from __future__ import annotations

import pytest
import torch

from puna.errors import SettingsError
from puna.train.objectives import language_modelling
from puna.train.precision import LossScale, Precision, PrecisionSettings
from tests.train.tiny import CPU, TinySource, precision, tiny_model


@pytest.mark.parametrize(
    ("name", "compute", "master", "scales"),
    [
        ("float32", torch.float32, torch.float32, False),
        ("bfloat16", torch.bfloat16, torch.float32, False),
        ("float16", torch.float16, torch.float32, True),
        ("float64", torch.float64, torch.float64, False),
    ],
)
def test_types(name: str, compute: torch.dtype, master: torch.dtype, scales: bool) -> None:
    chosen = Precision.of(PrecisionSettings(dtype=name), CPU)
    assert (chosen.compute, chosen.master, chosen.scales) == (compute, master, scales)
    with chosen.autocast():
        assert torch.nn.Linear(2, 2, dtype=master)(torch.ones(1, 2, dtype=master)).dtype == compute


def test_an_unknown_type_is_told() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'bfloat16'"):
        Precision.of(PrecisionSettings(dtype="bfloat"), CPU)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_losses_and_gradients_are_near_those_of_float64(
    dtype: torch.dtype, tolerance: float
) -> None:
    batch = next(TinySource().steps(0)).batches[0]
    results = []
    for compute in (torch.float64, dtype):
        chosen = precision(compute)
        model = tiny_model(dtype=chosen.master)
        with chosen.autocast():
            loss, count, _ = language_modelling(model, batch)
        (loss / 128).backward()
        assert loss.dtype == chosen.master
        assert int(count) == int(batch.loss_mask.sum())
        gradients = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        results.append((loss.item(), gradients))
    (exact, gradient), (near, approximate) = results
    assert near == pytest.approx(exact, rel=tolerance / 10)
    assert (gradient - approximate).norm() < tolerance * gradient.norm()


def test_the_loss_scale_halves_on_overflow_and_doubles_after_clean_steps() -> None:
    state = LossScale(scale=8.0)
    assert state.overflowed()
    assert state == LossScale(scale=4.0)
    for _ in range(LossScale.GROWTH_STEPS):
        state.succeeded()
    assert state == LossScale(scale=8.0)
    state.succeeded()
    assert state.overflowed()
    assert state == LossScale(scale=4.0, clean=0)


def test_at_scale_one_an_overflow_is_no_longer_the_scales_fault() -> None:
    assert not LossScale(scale=1.0).overflowed()

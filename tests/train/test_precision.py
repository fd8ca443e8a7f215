from __future__ import annotations

import pytest
import torch

from puna.errors import SettingsError
from puna.settings import parse
from puna.train.objectives import language_modelling
from puna.train.precision import Kept, LossScale, Precision, PrecisionSettings
from tests.train.tiny import CPU, TinySource, precision, tiny_model

FLOAT, BFLOAT = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("name", "weights", "compute", "stored", "master", "words"),
    [
        ("float32", "float32", FLOAT, FLOAT, FLOAT, "float32"),
        ("bfloat16", "float32", BFLOAT, FLOAT, FLOAT, "bfloat16 with float32 weights"),
        ("float16", "float32", torch.float16, FLOAT, FLOAT, "float16 with float32 weights"),
        ("float64", "float32", torch.float64, torch.float64, torch.float64, "float64"),
        ("bfloat16", "bfloat16", BFLOAT, BFLOAT, BFLOAT, "bfloat16 with bfloat16 weights"),
        ("bfloat16", "bfloat16+float32", BFLOAT, BFLOAT, FLOAT, "bfloat16 with bfloat16+float32 weights"),
    ],
)
def test_types(
    name: str, weights: Kept, compute: torch.dtype, stored: torch.dtype, master: torch.dtype, words: str
) -> None:
    chosen = Precision.of(PrecisionSettings(dtype=name, weights=weights), CPU)
    assert (chosen.compute, chosen.stored, chosen.master) == (compute, stored, master)
    assert chosen.scales == (name == "float16")
    assert str(chosen) == words
    with chosen.autocast():
        assert torch.nn.Linear(2, 2, dtype=stored)(torch.ones(1, 2, dtype=stored)).dtype == compute


@pytest.mark.parametrize("name", ["float32", "float16", "float64"])
@pytest.mark.parametrize("weights", ["bfloat16", "bfloat16+float32"])
def test_weights_in_bfloat16_stand_beside_products_in_bfloat16_alone(name: str, weights: Kept) -> None:
    with pytest.raises(SettingsError, match=f"needs products in bfloat16, got {name}; set precision.dtype"):
        Precision.of(PrecisionSettings(dtype=name, weights=weights), CPU)


def test_what_auto_chose_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.devices.multiplies_bfloat16", lambda device: False)
    with pytest.raises(SettingsError, match="got float32, which auto chose for cpu; set"):
        Precision.of(PrecisionSettings(weights="bfloat16"), CPU)


def test_unknown_weights_are_told() -> None:
    with pytest.raises(SettingsError, match=r"'weights': .*'bfloat16\+float32'.*got 'bf16'"):
        parse(PrecisionSettings, {"weights": "bf16"})


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

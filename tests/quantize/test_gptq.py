"""GPTQ: the codes of the paper's algorithm, the error it promises, and what it does with odd calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.errors import DataError, ModelError
from puna.model.weights import Packed
from puna.quantize import gptq as module
from puna.quantize.codes import expand, whole_numbers
from puna.quantize.gptq import Gptq, GptqSettings
from puna.quantize.schemes import Format, quantized
from tests.reference.numpy_gptq import gptq as reference

FORMAT = Format("int4", 32, torch.float16)
PAPER = GptqSettings(sweeps=0)


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Rows whose columns follow each other and differ in size, as activations do."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random) * torch.logspace(0, -1.5, inputs)[:, None]
    return torch.randn(rows, inputs, generator=random) @ mixing + 0.3


def weight_of(outputs: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def fitted(x: Tensor, settings: GptqSettings = PAPER, **more: Any) -> Gptq:
    found = Gptq(x.shape[1], settings, **more)
    for part in x.split(100):
        found.add(part)
    return found


def error(x: Tensor, weight: Tensor, packed: Packed) -> float:
    return float((x.double() @ (weight - expand(packed)).double().T).square().sum())


@pytest.mark.parametrize("order", ["activation", "none"])
@pytest.mark.parametrize("group", [32, 128])
def test_codes_are_those_of_the_papers_algorithm(order: str, group: int) -> None:
    x, weight, format = correlated(500, 256), weight_of(24, 256), Format("int4", group, torch.float32)
    found = fitted(x, GptqSettings(sweeps=0, order=order), dtype=torch.float64).quantized(weight, format)
    assert found.scales is not None
    wide = x.double().numpy()
    columns = np.argsort(-np.square(wide).sum(0)) if order == "activation" else np.arange(256)
    scales = found.scales.double().numpy()
    expected = reference(weight.numpy(), wide, scales, group, 0.01, columns)
    assert np.array_equal(whole_numbers(found).numpy(), expected)


@pytest.mark.parametrize(
    ("settings", "share"), [(PAPER, 0.35), (GptqSettings(), 0.28)], ids=["paper", "sweeps"]
)
def test_the_error_on_correlated_inputs_is_a_fraction_of_rounding_to_nearest(
    settings: GptqSettings, share: float
) -> None:
    x, weight = correlated(1000, 256), weight_of(96, 256)
    outcome = fitted(x, settings).compensated(weight, FORMAT)
    assert error(x, weight, outcome.packed) < share * error(x, weight, quantized(weight, FORMAT))
    assert outcome.error < outcome.nearest_error


def test_errors_told_are_those_on_the_inputs_and_of_damping() -> None:
    x, weight = correlated(300, 64), weight_of(16, 64)
    outcome = fitted(x, GptqSettings(damping=1e-6), dtype=torch.float64).compensated(weight, FORMAT)
    assert outcome.error == pytest.approx(error(x, weight, outcome.packed), rel=1e-3)
    assert outcome.nearest_error == pytest.approx(error(x, weight, quantized(weight, FORMAT)), rel=1e-3)


def test_every_sweep_lowers_the_error() -> None:
    x, weight = correlated(1000, 256), weight_of(32, 256)
    errors = [
        fitted(x, GptqSettings(sweeps=sweeps), dtype=torch.float64).compensated(weight, FORMAT).error
        for sweeps in range(4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.95 * errors[0]


def test_no_row_is_worse_than_rounding_to_nearest() -> None:
    x, weight = torch.randn(600, 64, generator=torch.Generator().manual_seed(2)), weight_of(400, 64)
    outcome = fitted(x, dtype=torch.float64).compensated(
        weight, FORMAT
    )  # nothing to compensate: many fall back
    hessian = x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(64)
    lost, nearest = (
        (((weight - expand(packed)).double() @ hessian) * (weight - expand(packed))).sum(1)
        for packed in (outcome.packed, quantized(weight, FORMAT))
    )
    assert bool((lost <= nearest * (1 + 1e-9)).all())
    assert 10 < outcome.fallbacks <= int((lost == nearest).sum())  # some rows are the same both ways


def test_several_matrices_share_what_was_learnt() -> None:
    x = correlated(400, 128)
    shared = fitted(x)
    for seed in (3, 4):
        weight = weight_of(8, 128, seed)
        again = fitted(x).quantized(weight, FORMAT)
        assert torch.equal(shared.quantized(weight, FORMAT).data, again.data)


def test_parts_of_the_calibration_add_up() -> None:
    x, weight = correlated(400, 128), weight_of(16, 128)
    whole = Gptq(128, PAPER, dtype=torch.float64)
    whole.add(x.view(4, 100, 128))
    parts = fitted(x[:200], dtype=torch.float64)
    early = parts.quantized(weight, FORMAT)
    parts.add(x[200:])
    assert parts.rows == whole.rows == 400
    assert torch.equal(parts.quantized(weight, FORMAT).data, whole.quantized(weight, FORMAT).data)
    assert not torch.equal(early.data, whole.quantized(weight, FORMAT).data)


def test_wide_matrices_are_summed_in_strips() -> None:
    x, weight = correlated(80, 1056), weight_of(4, 1056)
    gptq = fitted(x, dtype=torch.float64)
    outcome = gptq.compensated(weight, FORMAT)
    hessian = gptq._hessian
    assert torch.allclose(hessian, x.double().T @ x.double(), rtol=1e-9)
    assert outcome.error < 0.5 * outcome.nearest_error


def test_columns_never_active_are_rounded_to_nearest() -> None:
    x, weight = correlated(300, 64), weight_of(16, 64)
    x[:, [5, 40, 63]] = 0
    packed = fitted(x).quantized(weight, FORMAT)
    assert packed.scales is not None
    steps = packed.scales.float().repeat_interleave(32, 1)
    lost = (expand(packed) - weight)[:, [5, 40, 63]].abs()
    assert bool((lost <= 0.51 * steps[:, [5, 40, 63]].abs()).float().mean() > 0.9)  # but for those cut off
    all_dead = fitted(torch.zeros(10, 64)).quantized(weight, FORMAT)
    assert torch.equal(expand(all_dead), expand(quantized(weight, FORMAT)))


def test_damping_rises_where_h_is_singular() -> None:
    row = correlated(1, 64)
    gptq = fitted(1e3 * row.repeat(5, 1), GptqSettings(damping=1e-12))
    outcome = gptq.compensated(weight_of(8, 64), FORMAT)
    assert gptq._factored().damping > 1e-12
    assert outcome.error < outcome.nearest_error


def test_the_sources_inputs_make_good_what_was_lost_before() -> None:
    source, weight = correlated(1000, 128), weight_of(64, 128)
    x = source + 0.2 * correlated(1000, 128, seed=5)
    blind, seeing = Gptq(128), Gptq(128)
    blind.add(x)
    for part, meant in zip(x.split(250), source.split(250), strict=True):
        seeing.add(part, meant)
    aim = source @ weight.T
    lost = [
        float((x @ expand(gptq.quantized(weight, FORMAT)).T - aim).square().sum()) for gptq in (blind, seeing)
    ]
    assert lost[1] < 0.7 * lost[0]


def aimed(
    rows: int = 600, inputs: int = 64, outputs: int = 48
) -> tuple[Gptq, Tensor, Tensor, Tensor, Tensor]:
    """What was collected of inputs, those of the source and what a stream lacks; these three, and W."""
    source, weight = correlated(rows, inputs).double(), weight_of(outputs, inputs)
    x = source + 0.2 * correlated(rows, inputs, seed=5)
    missing = 0.3 * x @ weight_of(outputs, inputs, seed=6).double().T / inputs**0.5
    missing += 0.1 * correlated(rows, outputs, seed=7)
    found = Gptq(inputs, PAPER, dtype=torch.float64)
    for parts in zip(x.split(250), source.split(250), missing.split(250), strict=True):
        found.add(*parts)
    return found, x, source, missing, weight


def least_squares(x: Tensor, meant: Tensor, weight: Tensor) -> np.ndarray:
    """The V that minimizes ‖x Vᵀ - meant‖² + damping · ‖V - W‖²."""
    root = np.sqrt(0.01 * np.square(x.numpy()).sum(0).mean())
    rows = np.concatenate([x.numpy(), root * np.eye(x.shape[1])])
    goal = np.concatenate([meant.numpy(), root * weight.double().numpy().T])
    return np.linalg.lstsq(rows, goal, rcond=None)[0].T


@pytest.mark.parametrize("held", [1 << 26, 64 * 7], ids=["at once", "in parts"])
def test_the_aim_is_the_least_squares_of_the_sources_stream(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HELD", held)
    gptq, x, source, missing, weight = aimed()
    meant = missing + source @ weight.double().T
    aim = gptq.aim(weight)
    assert np.allclose(aim, least_squares(x, meant, weight), rtol=1e-6, atol=1e-7)
    packed = gptq.quantized(weight, FORMAT)
    assert packed.scales is not None
    order = np.argsort(-np.square(x.numpy()).sum(0))
    codes = reference(aim.numpy(), x.numpy(), packed.scales.double().numpy(), 32, 0.01, order)
    assert np.array_equal(whole_numbers(packed).numpy(), codes)


def test_a_stream_that_lacks_something_is_made_good_without_a_source_too() -> None:
    _, x, _, missing, weight = aimed()
    alone = Gptq(64, PAPER, dtype=torch.float64)
    alone.add(x, missing=missing)
    meant = missing + x @ weight.double().T
    assert np.allclose(alone.aim(weight), least_squares(x, meant, weight), rtol=1e-6, atol=1e-7)


def test_rounding_keeps_what_the_aim_gains() -> None:
    gptq, x, source, missing, weight = aimed()
    blind = Gptq(64, PAPER, dtype=torch.float64)
    blind.add(x, source)
    meant = missing + source @ weight.double().T
    lost = [
        float((x @ expand(found.quantized(weight, FORMAT)).double().T - meant).square().sum())
        for found in (blind, gptq)
    ]
    left = float((x @ gptq.aim(weight).T - meant).square().sum())  # no matrix does better
    assert lost[1] - left < 0.7 * (lost[0] - left)


def test_the_source_being_the_same_changes_nothing() -> None:
    x, weight = correlated(300, 64), weight_of(16, 64)
    same = Gptq(64)
    same.add(x, x, torch.zeros(300, 16))
    alone = Gptq(64)
    alone.add(x)
    assert torch.equal(same.quantized(weight, FORMAT).data, alone.quantized(weight, FORMAT).data)
    assert torch.equal(same.aim(weight), weight) and torch.equal(alone.aim(weight), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_weights(dtype: torch.dtype) -> None:
    x, weight = correlated(300, 64).to(dtype), weight_of(16, 64).to(dtype)
    outcome = fitted(x).compensated(weight, Format("int4", 32, torch.bfloat16))
    assert outcome.packed.scales is not None and outcome.packed.scales.dtype == torch.bfloat16
    assert outcome.error < 0.6 * outcome.nearest_error


def test_bad_input() -> None:
    weight = weight_of(4, 64)
    with pytest.raises(DataError, match="needs calibration text"):
        Gptq(64).quantized(weight, FORMAT)
    with pytest.raises(DataError, match="NaN or infinite activations: load the model in a wider number type"):
        Gptq(64).add(torch.full((2, 64), torch.nan))
    with pytest.raises(DataError, match="NaN or infinite activations"):
        Gptq(64).add(torch.zeros(2, 64), missing=torch.full((2, 4), torch.inf))
    with pytest.raises(ModelError, match="q_proj: gptq makes int4 in groups, got int8 per channel"):
        Gptq(64).quantized(weight, Format("int8", None, torch.float32), "q_proj")
    huge = Gptq(64)
    huge.add(torch.full((2, 64), 1e30))
    with pytest.raises(DataError, match="too large to sum their squares"):
        huge.quantized(weight, FORMAT)
    weight[1, 2] = torch.nan
    with pytest.raises(ModelError, match="q_proj holds NaN"):
        fitted(correlated(100, 64)).quantized(weight, FORMAT, "q_proj")
    with pytest.raises(ModelError, match="multiple of 32"):
        fitted(correlated(100, 48)).quantized(weight_of(4, 48), FORMAT)

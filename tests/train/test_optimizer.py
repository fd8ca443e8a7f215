from __future__ import annotations

import tomllib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from puna.errors import CheckpointError, SettingsError
from puna.model.llama import Llama
from puna.settings import parse, to_toml
from puna.train.gradients import accumulate
from puna.train.loop import LoopSettings, TrainState, train
from puna.train.muon import MuonSettings, movement, orthogonal
from puna.train.objectives import language_modelling
from puna.train.optimizer import (
    Optimizer,
    OptimizerSettings,
    build,
    bytes_per_number,
    load_state_tensors,
    state_tensors,
)
from puna.train.precision import Kept, Precision
from tests.train.tiny import CPU, TinySource, bits, same_bits, tiny_model

SETTINGS = OptimizerSettings(learning_rate=0.01)
MUON = OptimizerSettings(name="muon", learning_rate=0.01)
WEIGHTS: tuple[Kept, ...] = ("float32", "bfloat16+float32", "bfloat16")
VARIANTS = [(name, weights) for name in ("adamw", "muon") for weights in WEIGHTS]


def variant(name: str, weights: Kept, seed: int = 0) -> tuple[Llama, Optimizer, Precision]:
    compute = torch.float32 if weights == "float32" else torch.bfloat16
    precision = Precision(CPU, compute, weights)
    model = tiny_model(dtype=precision.stored)
    return model, build(model, OptimizerSettings(name=name), precision, seed), precision


def gradients_of(model: nn.Module, step: int) -> None:
    source = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        wide = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        parameter.grad = wide.bfloat16().to(parameter.dtype)  # the same numbers in every type


def decays(name: str) -> bool:
    return not name.endswith("norm.weight") and "layernorm" not in name


# AdamW


def test_adamw_follows_the_paper_and_decays_matrices_only() -> None:
    """Algorithm 2 of arXiv 1711.05101, written out."""
    model = tiny_model(dtype=torch.float64)
    wanted = bits(model)
    first, second = ({name: torch.zeros_like(p) for name, p in wanted.items()} for _ in range(2))
    optimizer = build(model, SETTINGS)
    for step in range(1, 4):
        gradients_of(model, step)
        for name, parameter in model.named_parameters():
            gradient, weight = parameter.grad / 4, wanted[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            if decays(name):
                weight -= 0.01 * 0.1 * weight
            corrected = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            weight -= 0.01 * corrected[0] / (corrected[1].sqrt() + 1e-8)
        optimizer.step(0.01, factor=0.25)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-12, atol=1e-14)


def test_adamw_in_float32_is_torchs() -> None:
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build(ours, SETTINGS)
    groups = [
        {
            "params": [p for name, p in theirs.named_parameters() if decays(name) is decayed],
            "weight_decay": decay,
        }
        for decayed, decay in ((True, 0.1), (False, 0.0))
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        gradients_of(ours, step)
        gradients_of(theirs, step)
        optimizer.step(0.01)
        reference.step()
    wanted = bits(theirs)
    for name, weight in bits(ours).items():
        torch.testing.assert_close(weight, wanted[name], rtol=2e-6, atol=2e-7)


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    model = tiny_model()
    optimizer, before = build(model, SETTINGS), bits(model)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    optimizer.step(0.01)
    assert [name for name, weight in bits(model).items() if not weight.equal(before[name])] == [
        "lm_head.weight"
    ]
    assert {name.partition(".")[2] for name in state_tensors(optimizer)} == {"lm_head.weight"}


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in {one.name for one in build(model, SETTINGS).trained}


# Types of weights


def test_a_master_copy_goes_the_way_of_float32_weights() -> None:
    exact, copied = tiny_model(dtype=torch.bfloat16).float(), tiny_model(dtype=torch.bfloat16)
    one = build(exact, SETTINGS)
    other = build(copied, SETTINGS, Precision(CPU, torch.bfloat16, "bfloat16+float32"))
    for step in range(5):
        for model, optimizer in ((exact, one), (copied, other)):
            gradients_of(model, step)
            optimizer.step(0.001)
    wanted, masters = bits(exact), state_tensors(other)
    for name, weight in bits(copied).items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(masters[f"master.{name}"], wanted[name])
        assert torch.equal(weight, wanted[name].bfloat16())


def test_pure_bfloat16_follows_float32_where_rounding_to_nearest_would_stand_still() -> None:
    exact, pure = tiny_model(dtype=torch.bfloat16).float(), tiny_model(dtype=torch.bfloat16)
    start = bits(exact)
    pairs = [
        (exact, build(exact, SETTINGS)),
        (pure, build(pure, SETTINGS, Precision(CPU, torch.bfloat16, "bfloat16"))),
    ]
    for _ in range(30):
        for model, optimizer in pairs:
            gradients_of(model, 1)
            optimizer.step(1e-5)  # near 1 a last bit is 4e-3
    moved = torch.cat([(weight - start[name]).flatten() for name, weight in bits(exact).items()])
    found = torch.cat([(weight.float() - start[name]).flatten() for name, weight in bits(pure).items()])
    slope = float((moved * found).sum() / moved.square().sum())
    assert slope == pytest.approx(1, abs=0.02)


def test_random_bits_are_of_the_seed_the_step_and_the_name_alone() -> None:
    runs = []
    for seed, backwards in ((0, False), (0, True), (1, False)):
        model, optimizer, _ = variant("adamw", "bfloat16", seed)
        if backwards:
            optimizer.trained = optimizer.trained[::-1]
        for step in range(3):
            gradients_of(model, step)
            optimizer.step(0.001)
        runs.append(bits(model))
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])


@pytest.mark.parametrize("micro_rows", [8, 4])
@pytest.mark.parametrize(("rule", "weights"), VARIANTS)
def test_bytes_per_number_are_those_of_the_tensors(rule: str, weights: Kept, micro_rows: int) -> None:
    model, optimizer, precision = variant(rule, weights)
    name, parameter = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
    batches = next(TinySource(micro_rows).steps(0)).batches
    accumulate(language_modelling, model, batches, precision, seeds=range(len(batches)))
    found = {"weights": parameter.nbytes, "gradients": parameter.grad.nbytes}
    optimizer.step(0.01)
    found["optimizer"] = sum(x.nbytes for x in optimizer.state[name].values() if x.dim())
    expected = bytes_per_number(precision, rule, len(batches))
    assert found == {part: count * parameter.numel() for part, count in expected.items()}


# Muon


def muon_by_hand(weight: Any, gradient: Any, momentum: Any) -> tuple[Any, Any]:
    """One step of Muon in NumPy at a rate of 0.01 and a decay of 0.1."""
    momentum = 0.95 * momentum + 0.05 * gradient
    x = 0.05 * gradient + 0.95 * momentum
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return 0.999 * weight - 0.01 * 0.2 * np.sqrt(max(weight.shape)) * x, momentum


def test_muon_moves_the_matrices_of_layers_as_written_out_and_adamw_the_rest() -> None:
    model, plain = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    optimizer, adamw = build(model, MUON), build(plain, SETTINGS)
    by_hand = {
        name: (weight.numpy(), np.zeros(weight.shape))
        for name, weight in bits(model).items()
        if weight.dim() == 2
    }
    for step in range(3):
        for each, its in ((model, optimizer), (plain, adamw)):
            gradients_of(each, step)
            if each is model:
                for name, parameter in each.named_parameters():
                    if name in by_hand:
                        weight, momentum = by_hand[name]
                        by_hand[name] = muon_by_hand(weight, parameter.grad.numpy() / 2, momentum)
            its.step(0.01, factor=0.5)
    others = bits(plain)
    for name, moved in bits(model).items():
        if ".layers." in name and moved.dim() == 2:
            np.testing.assert_allclose(moved.numpy(), by_hand[name][0], rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(moved, others[name]), name
    assert sorted({key.partition(".")[0] for key in state_tensors(optimizer)}) == [
        "exp_avg", "exp_avg_sq", "momentum", "step",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthogonal_matrices_have_singular_values_near_one_and_the_same_vectors(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonal(matrix, 5, dtype)
    assert (found.dtype, found.shape) == (dtype, matrix.shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.t() @ found.double() @ vh.t()
    values = inside.diagonal()[s > 0.02 * s.max()]
    assert values.min() > 0.65 and values.max() < 1.25
    assert (inside - inside.diagonal().diag()).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)


def test_a_muon_movement_is_of_adamws_size() -> None:
    gradient = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    for matrix in (gradient, gradient.t()):
        moved, _ = movement(matrix, torch.zeros_like(matrix), MuonSettings(), torch.float32)
        assert float(moved.square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    zeros = torch.zeros(4, 6)
    moved, momentum = movement(zeros, zeros, MuonSettings(), torch.float32)
    assert moved.count_nonzero() == momentum.count_nonzero() == 0


# State


@pytest.mark.parametrize(("name", "weights"), VARIANTS)
def test_state_put_back_goes_on_bit_for_bit(name: str, weights: Kept) -> None:
    model, optimizer, _ = variant(name, weights)
    for step in range(2):
        gradients_of(model, step)
        optimizer.step(0.01)
    saved = {key: tensor.clone() for key, tensor in state_tensors(optimizer).items()}
    other, resumed, _ = variant(name, weights)
    other.load_state_dict(model.state_dict())
    load_state_tensors(resumed, saved)
    for m, o in ((model, optimizer), (other, resumed)):
        gradients_of(m, 2)
        o.step(0.01)
    assert same_bits(bits(model), bits(other))
    assert same_bits(state_tensors(optimizer), state_tensors(resumed))
    assert not torch.equal(
        saved["exp_avg.lm_head.weight"], state_tensors(optimizer)["exp_avg.lm_head.weight"]
    )


def test_state_that_torchs_adamw_saved_is_taken_up() -> None:
    """As checkpoints of earlier versions hold it."""
    ours, theirs = tiny_model(), tiny_model()
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    gradients_of(theirs, 0)
    reference.step()
    saved = {
        f"{kind}.{name}": value
        for name, parameter in theirs.named_parameters()
        for kind, value in reference.state[parameter].items()
    }
    ours.load_state_dict(theirs.state_dict())
    optimizer = build(ours, SETTINGS)
    load_state_tensors(optimizer, saved)
    assert optimizer.state["lm_head.weight"]["step"] == 1
    for model in (ours, theirs):
        gradients_of(model, 1)
    optimizer.step(0.01)
    reference.step()
    torch.testing.assert_close(ours.lm_head.weight, theirs.lm_head.weight, rtol=1e-6, atol=1e-7)


def test_tied_embeddings_have_one_state() -> None:
    model = tiny_model(tied=True)
    optimizer = build(model, SETTINGS)
    gradients_of(model, 1)
    optimizer.step(0.01)
    names = state_tensors(optimizer)
    assert "exp_avg.model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)


def test_state_of_another_model_is_refused() -> None:
    optimizer = build(tiny_model(), SETTINGS)
    with pytest.raises(CheckpointError, match=r"'exp_avg\.nothing\.weight' belongs to no trained parameter"):
        load_state_tensors(optimizer, {"exp_avg.nothing.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"expected shape \(32,\), got \(3,\)"):
        load_state_tensors(optimizer, {"exp_avg.model.norm.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("saved", "resumed", "reason"),
    [
        (("adamw", "float32"), ("muon", "float32"), "expected momentum, step, got exp_avg, exp_avg_sq, step"),
        (("adamw", "bfloat16+float32"), ("adamw", "bfloat16"), "expected torch.bfloat16, got torch.float32"),
        (("adamw", "float32"), ("adamw", "bfloat16+float32"), "expected exp_avg, exp_avg_sq, master, step"),
    ],
)
def test_state_of_another_variant_is_refused(
    saved: tuple[str, Kept], resumed: tuple[str, Kept], reason: str
) -> None:
    model, optimizer, _ = variant(*saved)
    gradients_of(model, 0)
    optimizer.step(0.01)
    with pytest.raises(CheckpointError, match=f"{reason}.*init_from"):
        load_state_tensors(variant(*resumed)[1], state_tensors(optimizer))


# Whole runs


class Run:
    """A tiny training of a variant."""

    def __init__(self, name: str, weights: Kept, micro_rows: int = 8) -> None:
        self.model, self.optimizer, self.precision = variant(name, weights)
        self.state, self.micro_rows = TrainState(), micro_rows
        self.losses: list[float] = []

    def go(self, steps: int) -> Run:
        train(
            language_modelling, self.model, self.optimizer, TinySource(self.micro_rows), self.state,
            settings=LoopSettings(steps=steps), rate=lambda step: 0.01, precision=self.precision,
            record=lambda kind, **values: self.losses.append(values["loss"]),
        )  # fmt: skip
        return self


@pytest.mark.parametrize(("name", "weights"), VARIANTS)
def test_every_variant_learns(name: str, weights: Kept) -> None:
    losses = Run(name, weights).go(30).losses
    assert losses[0] == pytest.approx(4.6, abs=0.2)
    assert losses[-1] < 2.5
    assert losses == Run(name, weights).go(30).losses


@pytest.mark.parametrize("micro_rows", [8, 4])
@pytest.mark.parametrize(("name", "weights"), VARIANTS)
def test_every_variant_resumes_bit_for_bit(name: str, weights: Kept, micro_rows: int) -> None:
    whole, first, second = (Run(name, weights, micro_rows) for _ in range(3))
    whole.go(5)
    first.go(2)
    second.model.load_state_dict(first.model.state_dict())
    load_state_tensors(second.optimizer, state_tensors(first.optimizer))
    second.state = TrainState.from_values(first.state.values())
    second.go(5)
    assert first.losses + second.losses == whole.losses
    assert same_bits(bits(second.model), bits(whole.model))


# Settings


def test_settings_survive_toml_and_refuse_what_is_wrong() -> None:
    for settings in (SETTINGS, OptimizerSettings(name="muon", muon=MuonSettings(momentum=0.9))):
        assert parse(OptimizerSettings, tomllib.loads(to_toml(settings))) == settings
    with pytest.raises(SettingsError, match="Did you mean 'adamw'"):
        parse(OptimizerSettings, {"name": "adam"})
    with pytest.raises(SettingsError, match="less than 1"):
        parse(OptimizerSettings, {"betas": [0.9, 1.0]})
    with pytest.raises(SettingsError, match=r'optimizer.muon is for optimizer.name = "muon", got .adamw.'):
        parse(OptimizerSettings, {"muon": {"momentum": 0.9}})

from __future__ import annotations

import tomllib

import pytest
import torch
from torch import nn

from puna.errors import CheckpointError, SettingsError
from puna.settings import parse, to_toml
from puna.train.optimizer import OptimizerSettings, build, load_state_tensors, state_tensors
from tests.train.tiny import bits, same_bits, tiny_model

SETTINGS = OptimizerSettings(learning_rate=0.01)


def gradients_of(model: nn.Module, step: int) -> None:
    source = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)


def test_adamw_follows_the_paper_and_decays_matrices_only() -> None:
    """Algorithm 2 of arXiv 1711.05101, written out."""
    model = tiny_model(dtype=torch.float64)
    wanted = bits(model)
    first, second = ({name: torch.zeros_like(p) for name, p in wanted.items()} for _ in range(2))
    optimizer = build(model, SETTINGS)
    for step in range(1, 4):
        gradients_of(model, step)
        for name, parameter in model.named_parameters():
            gradient, weight = parameter.grad, wanted[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            if not name.endswith("norm.weight") and "layernorm" not in name:
                weight -= 0.01 * 0.1 * weight
            corrected = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            weight -= 0.01 * corrected[0] / (corrected[1].sqrt() + 1e-8)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-12, atol=1e-14)


def test_state_put_back_goes_on_bit_for_bit() -> None:
    model = tiny_model()
    optimizer = build(model, SETTINGS)
    gradients_of(model, 1)
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in state_tensors(model, optimizer).items()}
    assert {"exp_avg.model.norm.weight", "exp_avg_sq.lm_head.weight", "step.lm_head.weight"} <= saved.keys()
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    resumed = build(other, SETTINGS)
    load_state_tensors(other, resumed, saved)
    for m, o in ((model, optimizer), (other, resumed)):
        gradients_of(m, 2)
        o.step()
    assert same_bits(bits(model), bits(other))
    assert not torch.equal(
        saved["exp_avg.lm_head.weight"], state_tensors(model, optimizer)["exp_avg.lm_head.weight"]
    )


def test_tied_embeddings_have_one_state() -> None:
    model = tiny_model(tied=True)
    optimizer = build(model, SETTINGS)
    gradients_of(model, 1)
    optimizer.step()
    names = state_tensors(model, optimizer)
    assert "exp_avg.model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)


def test_state_of_another_model_is_refused() -> None:
    model = tiny_model()
    optimizer = build(model, SETTINGS)
    with pytest.raises(CheckpointError, match=r"'exp_avg\.nothing\.weight' belongs to no trained parameter"):
        load_state_tensors(model, optimizer, {"exp_avg.nothing.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"expected shape \(32,\), got \(3,\)"):
        load_state_tensors(model, optimizer, {"exp_avg.model.norm.weight": torch.zeros(3)})


def test_settings_survive_toml_and_refuse_what_is_wrong() -> None:
    assert parse(OptimizerSettings, tomllib.loads(to_toml(SETTINGS))) == SETTINGS
    with pytest.raises(SettingsError, match="Did you mean 'adamw'"):
        parse(OptimizerSettings, {"name": "adam"})
    with pytest.raises(SettingsError, match="less than 1"):
        parse(OptimizerSettings, {"betas": [0.9, 1.0]})

"""Logits and every parameter's gradient, in float32, against transformers: within 1e-5 of their scale."""

from __future__ import annotations

import pytest
import torch

from puna.model.config import ModelConfig
from puna.model.rope import NoScaling
from puna.model.weights import weights_of
from tests.model.shapes import CONFIGS, SCALED, ids_of, model_of, summed_loss

transformers = pytest.importorskip("transformers")

LENGTH = 72  # four and a half times the context


def theirs_of(config: ModelConfig, weights, attention: str = "eager") -> torch.nn.Module:
    """A transformers model of the same config and weights; a sliding window makes it a Mistral."""
    values = config.model_dump(exclude={"residual_dropout", "rope_scaling"}, exclude_none=True)
    scaling = config.rope_scaling.model_dump(exclude_none=True)
    # The older spelling, which every version reads.
    values["rope_scaling"] = None if isinstance(config.rope_scaling, NoScaling) else scaling
    family = "llama" if config.sliding_window is None else "mistral"
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **values, use_cache=False), attn_implementation=attention
    )
    assert type(model).__name__ == f"{family.capitalize()}ForCausalLM"
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name):
    config = CONFIGS[name]
    ours = model_of(config)
    theirs = theirs_of(config, weights_of(ours))
    ids, targets = ids_of(config, 2, LENGTH), ids_of(config, 2, LENGTH, seed=1)

    logits, expected = ours(ids), theirs(ids).logits
    summed_loss(logits, targets).backward()
    summed_loss(expected, targets).backward()

    assert gap(logits, expected) < 1e-5
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert gap(parameters[parameter].grad, gradient) < 1e-5, parameter


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [1, 2, 17, LENGTH - 1, LENGTH, LENGTH + 1])
def test_logits_with_a_window_equal_mistrals(window, attention):
    config = CONFIGS["sliding window"].model_copy(update={"sliding_window": window})
    ours = model_of(config)
    ids = ids_of(config, 2, LENGTH)

    theirs = theirs_of(config, weights_of(ours), attention)

    assert gap(ours(ids), theirs(ids).logits) < 1e-5


def test_the_parity_above_would_notice_a_window_that_is_one_off():
    config = CONFIGS["sliding window"]
    ids = ids_of(config, 2, LENGTH)
    wider = model_of(config.model_copy(update={"sliding_window": config.sliding_window + 1}))

    assert gap(wider(ids), model_of(config)(ids)) > 1e-2


@pytest.mark.parametrize("name", SCALED)
def test_the_parity_above_would_notice_a_missing_scaling(name):
    config = CONFIGS[name]
    ids = ids_of(config, 2, LENGTH)
    unscaled = model_of(config.model_copy(update={"rope_scaling": NoScaling()}))

    assert gap(unscaled(ids), model_of(config)(ids)) > 1e-2


def test_state_dict_names_are_those_of_transformers():
    config = CONFIGS["all at once"]
    ours = model_of(config)
    assert set(ours.state_dict()) == set(theirs_of(config, weights_of(ours)).state_dict())

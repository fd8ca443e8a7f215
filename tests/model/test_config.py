"""Configs: what is filled in, and one clear line for each fault, directly and inside other settings."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tomllib

import pytest

from puna.errors import SettingsError
from puna.model.config import ModelConfig
from puna.model.rope import SCALINGS, NoScaling, YarnScaling
from puna.settings import Settings, parse, read_settings, to_toml
from tests.model.shapes import CONFIGS

GOOD = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


class Holder(Settings):
    model: ModelConfig


def test_key_value_heads_and_head_width_are_filled_in():
    config = ModelConfig(**GOOD)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    assert config.rope_scaling == NoScaling()
    assert ModelConfig(**GOOD, num_key_value_heads=None, head_dim=None) == config
    assert ModelConfig(**GOOD, head_dim=20).head_dim == 20


def test_a_head_width_of_its_own_frees_hidden_size_from_heads():
    assert ModelConfig(**{**GOOD, "num_attention_heads": 7, "head_dim": 16}).num_key_value_heads == 7


FAULTS = {
    "odd head width": (
        {"head_dim": 7},
        "head_dim must be even, since rotary embedding turns pairs of dimensions, got 7; "
        "change num_attention_heads or set head_dim",
    ),
    "no window": ({"sliding_window": 0}, "'sliding_window': input should be greater than 0, got 0"),
    "derived odd head width": ({"hidden_size": 40}, "head_dim must be even"),
    "key/value heads": (
        {"num_key_value_heads": 3},
        "num_attention_heads 8 is not divisible by num_key_value_heads 3; "
        "every key/value head serves equally many query heads",
    ),
    "more key/value heads than heads": (
        {"num_key_value_heads": 16},
        "num_attention_heads 8 is not divisible by num_key_value_heads 16",
    ),
    "hidden size": (
        {"num_attention_heads": 7},
        "hidden_size 64 is not divisible by num_attention_heads 7; change one of them, or set head_dim",
    ),
    "zero layers": ({"num_hidden_layers": 0}, "'num_hidden_layers': input should be greater than 0, got 0"),
    "negative width": ({"hidden_size": -4}, "'hidden_size': input should be greater than 0, got -4"),
    "type": ({"vocab_size": "many"}, "'vocab_size': input should be a valid integer, got 'many'"),
    "dropout of one": ({"residual_dropout": 1.0}, "'residual_dropout': input should be less than 1, got 1.0"),
    "misspelt": ({"hiden_size": 4}, "unknown setting 'hiden_size'. Did you mean 'hidden_size'?"),
    "unknown scaling": (
        {"rope_scaling": {"rope_type": "yarm", "factor": 2.0}},
        "'rope_scaling': rope_type must be one of default, linear, dynamic, yarn, llama3, got 'yarm'. "
        "Did you mean 'yarn'?",
    ),
    "nameless scaling": (
        {"rope_scaling": {"factor": 2.0}},
        "'rope_scaling': rope_type is required: one of default, linear, dynamic, yarn, llama3",
    ),
    "scaling without its fields": (
        {"rope_scaling": {"rope_type": "yarn"}},
        "'rope_scaling.yarn.factor' is required; "
        "'rope_scaling.yarn.original_max_position_embeddings' is required",
    ),
    "misspelt scaling field": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "factr": 2.0}},
        "unknown setting 'rope_scaling.linear.factr'. Did you mean 'rope_scaling.factor'?",
    ),
    "shrinking factor": (
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        "'rope_scaling.linear.factor': input should be greater than or equal to 1, got 0.5",
    ),
    "crossed llama3 factors": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            }
        },
        "'rope_scaling.llama3': high_freq_factor 1.0 must be above low_freq_factor 4.0",
    ),
    "crossed yarn betas": (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 1.0,
                "beta_slow": 2.0,
            }
        },
        "'rope_scaling.yarn': beta_fast 1.0 must not be below beta_slow 2.0",
    ),
    "dynamic on the narrowest head": (
        {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_scaling dynamic needs a head_dim above 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_says_what_to_do(fault):
    change, message = FAULTS[fault]
    with pytest.raises(SettingsError) as caught:
        ModelConfig(**{**GOOD, **change})
    assert str(caught.value).startswith("ModelConfig: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fault_inside_other_settings_keeps_its_dotted_name_and_file():
    with pytest.raises(SettingsError) as caught:
        parse(Holder, {"model": {**GOOD, "hidden_size": -4, "rope_theeta": 1.0}}, "run.toml")
    assert str(caught.value) == (
        "run.toml: 'model.hidden_size': input should be greater than 0, got -4; "
        "unknown setting 'model.rope_theeta'. Did you mean 'model.rope_theta'?"
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_toml_and_pickle(name):
    config = CONFIGS[name]
    assert parse(ModelConfig, tomllib.loads(to_toml(config))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_overrides_reach_into_the_scaling():
    config = read_settings(
        ModelConfig,
        overrides=[
            *(f"{key}={value}" for key, value in GOOD.items()),
            "rope_scaling.rope_type=yarn",
            "rope_scaling.factor=4",
            "rope_scaling.original_max_position_embeddings=2048",
        ],
    )
    assert config.rope_scaling == YarnScaling(factor=4, original_max_position_embeddings=2048)


def test_the_table_of_scalings_names_them_as_they_name_themselves():
    for name, scaling in SCALINGS.items():
        assert scaling.model_fields["rope_type"].default == name


def test_the_model_needs_no_other_implementation():
    code = "import puna.model.presets, puna.model.initial, puna.model.counts, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "peft"} & set(loaded.stdout.split())

"""config.json in both spellings of the rotary embedding, with the defaults of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from puna.errors import ModelError
from puna.formats.config_json import read_bos_id, read_config, read_end_ids, write_config
from puna.model.config import ModelConfig
from tests.model.shapes import CONFIGS

NEEDED = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def written(config: ModelConfig) -> dict[str, Any]:
    """What a reader finds in the file."""
    return json.loads(json.dumps(write_config(config, torch.float32, 1, [2])))


def scaling_of(**values: Any) -> dict[str, Any]:
    return read_config({**NEEDED, **values}, "config.json").rope_scaling.model_dump(exclude_none=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_is_the_same(name: str) -> None:
    config = CONFIGS[name]
    assert read_config(written(config), "x") == config


@pytest.mark.parametrize("name", CONFIGS)
def test_each_spelling_alone_is_enough(name: str) -> None:
    config = CONFIGS[name]
    old, new = written(config), written(config)
    del old["rope_parameters"]
    del new["rope_theta"], new["rope_scaling"]
    assert read_config(old, "x") == config
    assert read_config(new, "x") == config


def test_dropout_and_initial_range_survive() -> None:
    config = ModelConfig(
        **CONFIGS["grouped"].model_dump(
            exclude={"residual_dropout", "attention_dropout", "initializer_range"}
        ),
        residual_dropout=0.1,
        attention_dropout=0.2,
        initializer_range=0.01,
    )
    assert read_config(written(config), "x") == config


def test_the_oldest_spelling_calls_the_kind_type() -> None:
    assert scaling_of(rope_scaling={"type": "linear", "factor": 2}) == {"rope_type": "linear", "factor": 2}
    assert (
        scaling_of(rope_scaling={"type": "yarn", "rope_type": "linear", "factor": 2.0})["rope_type"]
        == "linear"
    )


def test_what_a_scaling_leaves_out_is_what_transformers_takes() -> None:
    yarn = scaling_of(
        max_position_embeddings=4096,
        rope_scaling={
            "type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 1024,
            "finetuned": True,
        },
    )
    assert (yarn["factor"], yarn["original_max_position_embeddings"]) == (4.0, 1024)
    yarn = scaling_of(max_position_embeddings=4096, rope_scaling={"type": "yarn", "factor": 2.0})
    assert yarn["original_max_position_embeddings"] == 4096
    yarn = scaling_of(original_max_position_embeddings=512, rope_scaling={"type": "yarn", "factor": 2.0})
    assert yarn["original_max_position_embeddings"] == 512
    assert scaling_of(rope_parameters={"rope_theta": 1e6}) == {"rope_type": "default"}
    assert scaling_of(rope_scaling=None) == {"rope_type": "default"}


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(**{key: value for key, value in NEEDED.items() if key != "model_type"})
    ours = read_config(NEEDED, "x")
    for name in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "attention_dropout",
        "initializer_range",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    theirs = transformers.LlamaConfig.from_dict(written(config))
    expected = {"rope_theta": config.rope_theta, **config.rope_scaling.model_dump(exclude_none=True)}
    assert theirs.rope_parameters == expected
    assert theirs.head_dim == config.head_dim
    assert theirs.dtype == torch.float32
    assert read_config(json.loads(theirs.to_json_string()), "x") == config


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), ([5, 6], (5, 6)), (None, ()), (True, ()), ("x", ())]
)
def test_end_tokens_may_be_one_a_list_or_none(value: object, expected: tuple[int, ...]) -> None:
    assert read_end_ids({"eos_token_id": value}) == expected
    assert read_bos_id({"bos_token_id": value}) == (2 if value == 2 else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            "'MistralForCausalLM' is not supported.*'LlamaForCausalLM'",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": [], "model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"architectures": 3}, "'3' is not supported"),
        ({"hidden_act": "gelu"}, "gate takes 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type must be one of"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type must be one of"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'rope_scaling.linear.factor' is required"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}}, "yarn needs a factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"num_attention_heads": 5}, "not divisible"),
        ({"num_key_value_heads": 3}, "not divisible"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_config({**NEEDED, **change}, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert "\n" not in str(caught.value)

"""config.json in both spellings of the rotary embedding, with the defaults of transformers."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import torch

from puna.errors import ModelError
from puna.formats.huggingface.config_json import read_bos_id, read_config, read_end_ids, write_config
from puna.model.config import ModelConfig
from tests.formats.damage import bent
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


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_defaults_are_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    needed = {**NEEDED, "num_attention_heads": 8, "model_type": family}  # Mistral's key/value heads are 8
    theirs = transformers.AutoConfig.for_model(**needed)
    ours = read_config(needed, "x")
    for name in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_dropout",
        "initializer_range",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert not ours.attention_bias and not ours.mlp_bias
    assert ours.sliding_window == (theirs.sliding_window if family == "mistral" else None)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    family = "llama" if config.sliding_window is None else "mistral"
    theirs = transformers.CONFIG_MAPPING[family].from_dict(written(config))
    expected = {"rope_theta": config.rope_theta, **config.rope_scaling.model_dump(exclude_none=True)}
    assert theirs.rope_parameters == expected
    assert theirs.head_dim == config.head_dim
    assert theirs.num_key_value_heads == config.num_key_value_heads
    assert family == "llama" or theirs.sliding_window == config.sliding_window
    assert theirs.dtype == torch.float32
    assert read_config(json.loads(theirs.to_json_string()), "x") == config


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LLaMAForCausalLM", "YiForCausalLM", None])
@pytest.mark.parametrize("family", ["llama", "Yi", None])
def test_every_name_of_a_llama_is_known(name: str | None, family: str | None) -> None:
    if name is None and family is None:
        pytest.skip("then nothing says that it is one")
    needed = {key: value for key, value in NEEDED.items() if key != "model_type"}
    names = {} if name is None else {"architectures": [name]}
    kind = {} if family is None else {"model_type": family}
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"}}
    assert read_config({**needed, **names, **kind, **code}, "x") == read_config(NEEDED, "x")


@pytest.mark.parametrize("names", [{"architectures": ["MistralForCausalLM"]}, {"model_type": "mistral"}])
@pytest.mark.parametrize(
    ("given", "window"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 512}, 512)],
)
def test_a_mistral_has_the_window_it_says(
    names: dict[str, Any], given: dict[str, Any], window: int | None
) -> None:
    needed = {key: value for key, value in NEEDED.items() if key != "model_type"}
    config = read_config({**needed, **names, **given, "num_key_value_heads": 2}, "x")
    assert config.sliding_window == window
    assert written(config)["architectures"] == [
        "LlamaForCausalLM" if window is None else "MistralForCausalLM"
    ]
    assert ("sliding_window" in written(config)) == (window is not None)


def test_what_transformers_does_not_see_in_a_family_is_not_seen() -> None:
    assert read_config({**NEEDED, "sliding_window": 8}, "x") == read_config(NEEDED, "x")
    mistral = {**NEEDED, "model_type": "mistral", "num_key_value_heads": None}
    assert read_config({**mistral, "attention_bias": True, "mlp_bias": True}, "x") == read_config(
        mistral, "x"
    )
    assert read_config(mistral, "x").num_key_value_heads == 4
    alike = {"layer_types": ["sliding_attention"] * 2}
    assert read_config({**mistral, **alike}, "x") == read_config(mistral, "x")


@pytest.mark.parametrize("biases", [["attention_bias"], ["mlp_bias"], ["attention_bias", "mlp_bias"]])
def test_a_window_with_biases_has_no_name(biases: list[str]) -> None:
    config = CONFIGS["sliding window"].model_copy(update=dict.fromkeys(biases, True))
    with pytest.raises(ModelError, match=f"sliding_window 6 together with {' and '.join(biases)}: Mistral"):
        write_config(config, torch.float32, 1, [2])


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), ([5, 6], (5, 6)), (None, ()), (True, ()), ("x", ())]
)
def test_end_tokens_may_be_one_a_list_or_none(value: object, expected: tuple[int, ...]) -> None:
    assert read_end_ids({"eos_token_id": value}) == expected
    assert read_bos_id({"bos_token_id": value}) == (2 if value == 2 else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported.*'Mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "ForSequenceCl.*nearest.*'LlamaForCausalLM'"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "Llama4.*nearest.*'LlamaForCausalLM'"),
        ({"architectures": ["MllamaForConditionalGeneration"]}, "Mllama.*nearest.*'LlamaForCausalLM'"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2.*nearest.*'LlamaForCausalLM'"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2.*nearest"),
        ({"architectures": ["x" * 10**6]}, "xxx' is not supported"),
        ({"architectures": ["MistralForCausalLM"]}, "says MistralForCausalLM, but model_type 'llama'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window.*greater than 0, got 0"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window.*got '4096'"),
        ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_theta": "10000"}, "rope_theta.*got '10000'"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "factor.*got '8'"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings.*got '4096'"),
        ({"rope_parameters": {"full\nattention": {"rope_theta": 1e4}}}, "differ by kind of layer"),
        ({"architectures": [], "model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"architectures": 3}, "'3' is not supported"),
        ({"hidden_act": "gelu"}, "gate takes 'silu'"),
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


MANY_FIELDS = {
    **NEEDED,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention"],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "eos_token_id": [2, 3],
}


def bend_and_read(rounds: int) -> int:
    """How many of so many bent files were configs all the same; the others were refused in one line."""
    read = 0
    for seed in range(rounds):
        draw = random.Random(seed)
        values = bent(draw, bent(draw, MANY_FIELDS))
        began = time.monotonic()
        try:
            if isinstance(values, dict):
                read_end_ids(values)
                read_config(values, "x")
                read += 1
        except ModelError as error:
            assert "\n" not in str(error), seed
            assert len(str(error)) < 5000, seed
        assert time.monotonic() - began < 1, seed
    return read


def test_bent_files_are_refused_or_configs() -> None:
    assert 20 < bend_and_read(300) < 280


@pytest.mark.slow
def test_many_bent_files_are_refused_or_configs() -> None:
    assert bend_and_read(20_000) > 1000

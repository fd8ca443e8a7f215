"""Every kind of config.json in use: the file opens in transformers and here, with the same logits far out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna import formats
from puna.engine.llm import LLM
from puna.errors import ModelError
from puna.formats.huggingface.config_json import read_config
from puna.formats.packed import expanded
from puna.model.llama import Llama
from puna.model.weights import load_weights, weights_of
from tests.formats.conftest import edit
from tests.model.shapes import model_of

transformers = pytest.importorskip("transformers")

LENGTH = 72
CONTEXT = 16  # tokens lie at positions up to LENGTH, and once more far beyond
FAR = 3000

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
}
LLAMA = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 16}
MISTRAL = {
    **SHAPE,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# As published files of each kind spell it; sizes apart, and contexts so short that every scaling is at work.
VARIETIES: dict[str, dict[str, Any]] = {
    "Llama 1": {
        **SHAPE,
        "architectures": ["LLaMAForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-06,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": -1,
        "max_sequence_length": 2048,
        "torch_dtype": "float16",
        "use_cache": True,
    },
    "Llama 2": {
        **LLAMA,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    "Llama 2, tensor parallel": {**LLAMA, "num_key_value_heads": 2, "pretraining_tp": 4},
    "Code Llama": {**LLAMA, "rope_theta": 1000000, "rms_norm_eps": 1e-05},
    "Llama 3": {
        **LLAMA,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": [90, 91],
    },
    "Llama 3.1": {
        **LLAMA,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "mlp_bias": False,
    },
    "Llama 3.2, tied": {
        **LLAMA,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3, "factor": 32},
        "tie_word_embeddings": True,
    },
    "llama3, new spelling": {
        **LLAMA,
        "max_position_embeddings": 128,
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
    },
    "default, new spelling": {**LLAMA, "rope_parameters": {"rope_theta": 50000, "rope_type": "default"}},
    "default, both spellings": {
        **LLAMA,
        "rope_theta": 77777.0,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    },
    "TinyLlama": {**LLAMA, "num_key_value_heads": 1, "rms_norm_eps": 1e-05, "rope_scaling": None},
    "Vicuna 16k": {**LLAMA, "rope_scaling": {"factor": 8, "type": "linear"}},
    "linear, new spelling": {
        **LLAMA,
        "rope_parameters": {"rope_theta": 10000, "rope_type": "linear", "factor": 2.5},
    },
    "dynamic NTK": {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2}},
    "dynamic NTK, new spelling": {
        **LLAMA,
        "rope_theta": 5000.0,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
    },
    "yarn": {**LLAMA, "max_position_embeddings": 64, "rope_scaling": {**YARN, "finetuned": True}},
    "yarn, context unsaid": {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, factor null": {**LLAMA, "max_position_embeddings": 64, "rope_scaling": {**YARN, "factor": None}},
    "yarn, context beside": {
        **LLAMA,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 8,
        "rope_scaling": YARN,
    },
    "yarn, attention factor": {
        **LLAMA,
        "rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2},
    },
    "yarn, two magnitudes": {**LLAMA, "rope_scaling": {**YARN, "mscale": 1, "mscale_all_dim": 0.707}},
    "yarn, new spelling": {
        **LLAMA,
        "rope_parameters": {**YARN, "type": None, "rope_type": "yarn", "rope_theta": 1e6, "truncate": False},
    },
    "SmolLM": {
        **LLAMA,
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_interleaved": False,
        "is_llama_config": True,
        "initializer_range": 0.041666666666666664,
    },
    "Yi": {
        **LLAMA,
        "num_key_value_heads": 1,
        "rope_theta": 5000000.0,
        "pad_token_id": 0,
        "eos_token_id": 2,
    },
    "OpenLLaMA": {
        **LLAMA,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "pad_token_id": 0,
        "transformers_version": "4.30.0.dev0",
    },
    "head width of its own": {**LLAMA, "head_dim": 16, "num_key_value_heads": 2},
    "attention bias": {**LLAMA, "attention_bias": True},
    "mlp bias": {**LLAMA, "mlp_bias": True},
    "key/value heads null": {**LLAMA, "num_key_value_heads": None, "head_dim": None},
    "padded vocabulary": {**LLAMA, "vocab_size": 101, "pad_token_id": 100},
    "Mistral 0.1": {**MISTRAL, "sliding_window": 20},
    "Mistral, window unsaid": {**MISTRAL, "max_position_embeddings": 32768},
    "Mistral 0.2": {**MISTRAL, "sliding_window": None, "rope_theta": 1e6, "num_key_value_heads": 2},
    "Mistral Nemo": {**MISTRAL, "sliding_window": None, "head_dim": 16, "rope_theta": 1000000},
    "Mistral, heads unsaid": {
        **{key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"},
        "num_attention_heads": 8,
        "sliding_window": 9,
    },
    "Mistral, yarn": {**MISTRAL, "sliding_window": 20, "rope_scaling": YARN},
    "Mistral, new spelling": {
        **MISTRAL,
        "sliding_window": 7,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
}


def published(values: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights as transformers itself saves them, beside the config.json written by hand."""
    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(json.loads(json.dumps(values)))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    # Weights that make a mistake visible, under names and shapes that transformers chose.
    ours = read_here(values, directory)
    load = theirs.load_state_dict(dict(weights_of(model_of(ours))), strict=False)
    assert not load.unexpected_keys
    assert set(load.missing_keys) <= {"lm_head.weight"}
    theirs.to(dtype).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def read_here(values: dict[str, Any], directory: Path) -> Any:
    """Our reading of the file."""
    return read_config(json.loads(json.dumps(values)), str(directory))


def opened(directory: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model here."""
    source = formats.open_model(directory)
    model = Llama(source.config).to(dtype)
    load_weights(model, expanded(source.weights))
    return model.eval()


def opened_there(directory: Path, **options: Any) -> Any:
    """The model in transformers; nothing may be missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(report.values())
    return model.eval()


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def ids_of(values: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(values["vocab_size"], (2, LENGTH), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in VARIETIES]
    + [(name, "sdpa") for name in VARIETIES if name.startswith("Mistral")],
)
def test_logits_are_those_of_transformers(name: str, attention: str, tmp_path: Path) -> None:
    values = VARIETIES[name]
    directory = published(values, tmp_path)
    ours, theirs = opened(directory), opened_there(directory, dtype="float32", attn_implementation=attention)
    ids = ids_of(values)

    assert gap(ours(ids), theirs(ids).logits) < 1e-5
    positions = torch.arange(FAR, FAR + LENGTH).expand(2, -1)
    assert gap(ours(ids, positions), theirs(ids, position_ids=positions).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", [{"model_type": "Yi"}, {"architectures": ["YiForCausalLM"]}])
def test_the_first_yi_models_name_their_norms_otherwise(kind: dict[str, Any], tmp_path: Path) -> None:
    values = {key: value for key, value in VARIETIES["Yi"].items() if key != "architectures"}
    directory = published(values, tmp_path)
    expected = opened_there(directory, dtype="float32")(ids_of(values)).logits
    edit(directory / "config.json", lambda stored: stored.update(kind))
    tensors = load_file(directory / "model.safetensors")
    renamed = {
        name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"): tensor
        for name, tensor in tensors.items()
    }
    assert len(renamed.keys() - tensors.keys()) == 4
    assert gap(opened(directory)(ids_of(values)), expected) < 1e-5
    save_file(renamed, directory / "model.safetensors")
    assert gap(opened(directory)(ids_of(values)), expected) < 1e-5

    edit(directory / "config.json", lambda stored: stored.update(VARIETIES["Llama 2"]))
    with pytest.raises(ModelError, match=r"ln1\.weight.*not part of a model"):
        formats.open_model(directory)
    edit(directory / "config.json", lambda stored: stored.update(kind))
    copies = {name: tensor.clone() for name, tensor in renamed.items()}
    save_file({**tensors, **copies}, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"input_layernorm\.weight is both in"):
        opened(directory)


@torch.no_grad()
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama 2", "Llama 3.1", "yarn", "Mistral 0.1"])
def test_half_precision_files_are_those_of_transformers(
    name: str, dtype: torch.dtype, key: str, tmp_path: Path
) -> None:
    kind = str(dtype).removeprefix("torch.")
    directory = published({**VARIETIES[name], key: kind}, tmp_path, dtype)
    source = formats.open_model(directory)
    assert (source.dtype, set(source.stored)) == (dtype, {kind})
    ids = ids_of(VARIETIES[name])

    # Widened, the same numbers; as stored, the same up to the rounding of every step.
    ours, theirs = opened(directory)(ids), opened_there(directory, dtype="float32")(ids).logits
    assert gap(ours, theirs) < 1e-5
    rounded = opened(directory, dtype)(ids).float()
    assert gap(rounded, ours) < 2 * gap(opened_there(directory)(ids).logits.float(), theirs) + 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["Llama 1", "Llama 3.1", "dynamic NTK", "yarn", "SmolLM", "Yi", "Mistral 0.1"]
)
def test_what_is_written_of_it_opens_in_transformers_with_the_same_logits(name: str, tmp_path: Path) -> None:
    directory = published(VARIETIES[name], tmp_path / "published")
    formats.save(tmp_path / "ours", formats.open_model(directory).weights)
    ids = ids_of(VARIETIES[name])
    there, again = (
        opened_there(path, dtype="float32")(ids).logits for path in (directory, tmp_path / "ours")
    )
    assert torch.equal(there, again)


@pytest.mark.parametrize(
    ("name", "ends", "begin"),
    [("Llama 1", (1,), 0), ("Llama 3", (90, 91), None), ("Yi", (2,), None), ("Llama 2", (), None)],
)
def test_begin_and_end_are_the_files_own(
    name: str, ends: tuple[int, ...], begin: int | None, tmp_path: Path
) -> None:
    directory = published(VARIETIES[name], tmp_path)
    (directory / "generation_config.json").unlink()
    source = formats.open_model(directory)
    assert (source.end_ids, source.bos_id) == (ends, begin)


@torch.no_grad()
@pytest.mark.parametrize(("window", "cache"), [(1, False), (2, True), (3, True), (20, True)])
def test_greedy_answers_in_a_window_are_those_of_transformers(
    window: int, cache: bool, tmp_path: Path
) -> None:
    """Prompts of different length, all longer than the window, in one batch here and each alone there."""
    directory = published({**VARIETIES["Mistral 0.1"], "sliding_window": window}, tmp_path)
    theirs = opened_there(directory, dtype="float32")
    prompts = [ids_of(SHAPE)[row, :length] for row, length in ((0, 60), (1, 25), (1, 41))]
    answers = LLM(opened(directory)).generate(
        [prompt.tolist() for prompt in prompts], max_new_tokens=30, temperature=0.0, ignore_eos=True
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = theirs.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            max_new_tokens=30,
            pad_token_id=0,
            use_cache=cache,  # theirs forgets nothing where the window is 1
            eos_token_id=None,
        )
        assert list(answer.tokens) == expected[0, len(prompt) :].tolist()


def test_biases_of_a_mistral_are_told(tmp_path: Path) -> None:
    """A Mistral has no biases, so those that its files hold are named, whatever its config says of them."""
    directory = published(VARIETIES["attention bias"], tmp_path)
    edit(
        directory / "config.json",
        lambda values: values.update(
            architectures=["MistralForCausalLM"], model_type="mistral", num_key_value_heads=4
        ),
    )
    with pytest.raises(ModelError, match=r"self_attn\.k_proj\.bias.*not part of a model of this config"):
        formats.open_model(directory)

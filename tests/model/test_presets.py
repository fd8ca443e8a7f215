"""Presets against published figures: exact parameter counts, the paper's rule for F, the paper's tables."""

from __future__ import annotations

import json

import pytest
import torch

from puna.errors import ModelError
from puna.model.counts import ParameterCounts, flops_per_token, parameters
from puna.model.llama import Llama
from puna.model.presets import PAPER_TRAINING, PRESETS, feed_forward_width, preset
from tests.model.shapes import CONFIGS

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "puna-1m": 1_118_080,
    "puna-15m": 15_191_712,
    "puna-42m": 41_689_600,
    "puna-110m": 109_529_856,
}
# Meta's ffn_dim_multiplier and multiple_of, from params.json; llama2.c's small shapes round to 32.
RULE = {
    "llama-7b": (1.0, 256),
    "llama-13b": (1.0, 256),
    "llama-33b": (1.0, 256),
    "llama-65b": (1.0, 256),
    "llama-2-7b": (1.0, 256),
    "llama-2-13b": (1.0, 256),
    "llama-2-70b": (1.3, 4096),
    "codellama-7b": (1.0, 256),
    "codellama-13b": (1.0, 256),
    "codellama-34b": (1.0, 256),
    "llama-3-8b": (1.3, 1024),
    "llama-3-70b": (1.3, 4096),
    "llama-3.1-8b": (1.3, 1024),
    "llama-3.1-70b": (1.3, 4096),
    "llama-3.1-405b": (1.2, 4096),
    "llama-3.2-1b": (1.5, 256),
    "llama-3.2-3b": (1.0, 256),
    "tinyllama-1.1b": (1.0, 256),
    "puna-1m": (1.0, 8),
    "puna-15m": (1.0, 32),
    "puna-42m": (1.0, 32),
    "puna-110m": (1.0, 32),
}


def counted(model: Llama) -> ParameterCounts:
    """Parameters by part of a built model, by where its modules stand."""

    def size(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    layers = model.model.layers
    norms = [n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    return ParameterCounts(
        embedding=size(model.model.embed_tokens),
        attention=size(*(layer.self_attn for layer in layers)),
        mlp=size(*(layer.mlp for layer in layers)),
        norm=size(*norms, model.model.norm),
        head=0 if model.config.tie_word_embeddings else size(model.lm_head),
    )


def test_every_preset_is_tried_here():
    assert PRESETS.keys() == PUBLISHED.keys() == RULE.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert parameters(PRESETS[name]).total == PUBLISHED[name]


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()], ids=[*PRESETS, *CONFIGS])
def test_counts_by_arithmetic_are_those_of_a_built_model(config):
    with torch.device("meta"):
        model = Llama(config)
    assert parameters(config) == counted(model)
    assert parameters(config).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_feed_forward_widths_follow_the_paper(name):
    config = PRESETS[name]
    assert feed_forward_width(config.hidden_size, *RULE[name]) == config.intermediate_size


def test_context_base_and_epsilon():
    assert [preset(f"llama-{size}").rms_norm_eps for size in ("7b", "13b", "33b", "65b")] == [1e-6] * 3 + [
        1e-5
    ]
    assert [preset(n).max_position_embeddings for n in ("llama-7b", "llama-2-7b", "llama-3-8b")] == [
        2048,
        4096,
        8192,
    ]
    for name, factor in {"llama-3.1-8b": 8.0, "llama-3.1-405b": 8.0, "llama-3.2-1b": 32.0}.items():
        config = preset(name)
        assert (config.max_position_embeddings, config.rope_theta) == (131_072, 500_000.0)
        assert config.rope_scaling.model_dump() == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    assert preset("llama-3-8b").rope_scaling.rope_type == "default"


def test_the_papers_training_is_that_of_its_table(assets):
    tables = json.loads((assets / "reference" / "llama_paper_tables.json").read_text())
    rows = tables["table2_models"]
    for name, ours in PAPER_TRAINING.items():
        row = dict(zip(rows["columns"], rows[name.removeprefix("llama-").upper()], strict=True))
        assert (ours.learning_rate, ours.batch_tokens, ours.tokens) == (
            row["lr"],
            row["batch_tokens_M"] * 1_000_000,
            row["n_tokens_T"] * 1e12,
        )
        config = PRESETS[name]
        assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (
            row["dim"],
            row["n_heads"],
            row["n_layers"],
        )


def test_the_papers_training_covers_its_four_models():
    rates = {name: (t.learning_rate, t.tokens) for name, t in PAPER_TRAINING.items()}
    assert rates == {
        "llama-7b": (3e-4, 10**12),
        "llama-13b": (3e-4, 10**12),
        "llama-33b": (1.5e-4, 14 * 10**11),
        "llama-65b": (1.5e-4, 14 * 10**11),
    }
    assert {(t.batch_tokens, t.warmup_steps) for t in PAPER_TRAINING.values()} == {(4_000_000, 2000)}


def test_an_unknown_preset_gets_the_nearest_name():
    with pytest.raises(ModelError, match=r"no preset is called 'llama-7'\. Did you mean 'llama-7b'\?"):
        preset("llama-7")


@pytest.mark.parametrize("length", [2, 24])
@pytest.mark.parametrize("name", ["multi-head", "grouped", "tied", "explicit head width"])
def test_flops_are_those_that_torch_counts(name, length):
    """torch counts a full T×T attention; the causal half is (T + 1) / 2T of it."""
    from torch.utils.flop_counter import FlopCounterMode

    config = CONFIGS[name]
    model, ids = Llama(config, "reference"), torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    full = 3 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    causal = full * (length + 1) / (2 * length)
    assert (
        flops_per_token(config, length, training=True) == counter.get_total_flops() / length - full + causal
    )
    assert flops_per_token(config, length, training=False) * 3 == flops_per_token(
        config, length, training=True
    )


@pytest.mark.parametrize(("window", "length"), [(1, 5), (3, 2), (3, 3), (3, 4), (6, 41)])
def test_flops_of_a_window_are_those_of_the_keys_seen(window, length):
    plain = CONFIGS["grouped"]
    config = plain.model_copy(update={"sliding_window": window})
    seen = sum(min(window, position + 1) for position in range(length)) / length
    a_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    unseen = a_key * ((length + 1) / 2 - seen)
    for training, passes in ((False, 1), (True, 3)):
        difference = flops_per_token(plain, length, training) - flops_per_token(config, length, training)
        assert difference == pytest.approx(passes * unseen, rel=1e-12, abs=1e-6)
    assert (unseen > 0) == (length > window)


def test_flops_of_the_largest_are_six_per_parameter_and_a_little():
    config = preset("llama-65b")
    matrices = 6 * (parameters(config).total - parameters(config).embedding)
    assert flops_per_token(config, 1, training=True) == pytest.approx(matrices, rel=1e-3)
    # 6 · layers · heads · head width · (length + 1)
    attention = 6 * 80 * 64 * 128 * 2049
    assert flops_per_token(config, 2048, True) - flops_per_token(config, 1, True) == attention * 2047 / 2049

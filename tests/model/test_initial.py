"""Initial weights: a pure function of config and seed, with the spread that was asked for."""

from __future__ import annotations

import math

import pytest
import torch

from puna.model.initial import initial_weights, initialize
from puna.model.llama import Llama
from puna.model.presets import preset
from puna.model.weights import weights_of
from tests.model.shapes import CONFIGS, ids_of

CONFIG = preset("puna-1m")


def test_same_seed_same_weights_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = dict(initial_weights(CONFIG, 7))
    torch.manual_seed(2)
    second = dict(initial_weights(CONFIG, 7))
    other = dict(initial_weights(CONFIG, 8))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name]), name


def test_a_model_in_memory_and_a_meta_build_get_the_same():
    model = Llama(CONFIG)
    with torch.device("meta"):
        meta = Llama(CONFIG)
    before = torch.get_rng_state()
    initialize(model, 3)
    initialize(meta, 3)
    assert torch.equal(before, torch.get_rng_state())
    for (name, first), (_, second) in zip(weights_of(model), weights_of(meta), strict=True):
        assert torch.equal(first, second), name
    assert meta.lm_head.weight is meta.model.embed_tokens.weight


def test_spread_is_smaller_where_layers_add_to_the_stream():
    for name, tensor in initial_weights(CONFIG, 0):
        if tensor.dim() == 1:
            continue
        shrink = 1 / math.sqrt(2 * CONFIG.num_hidden_layers)
        expected = 0.02 * (shrink if "o_proj" in name or "down_proj" in name else 1)
        assert tensor.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(tensor.mean().item()) < 4 * expected / math.sqrt(tensor.numel()), name


def test_no_two_matrices_are_alike():
    matrices = [tensor.flatten()[:64] for _, tensor in initial_weights(CONFIG, 0) if tensor.dim() == 2]
    correlations = torch.corrcoef(torch.stack(matrices)) - torch.eye(len(matrices))
    assert correlations.abs().max() < 0.6


def test_gains_are_one_and_biases_zero():
    for name, tensor in initial_weights(CONFIGS["all at once"], 0):
        if tensor.dim() == 1:
            assert (tensor == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_an_initial_model_knows_nothing_yet():
    model = Llama(CONFIG)
    initialize(model, 0)
    ids = ids_of(CONFIG, 4, 64)
    logits = model(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(CONFIG.vocab_size), abs=0.1)

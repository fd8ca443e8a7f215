"""Weights as a value: names and shapes, a round trip, adoption by a meta build, and every fault named."""

from __future__ import annotations

import re

import pytest
import torch

from puna.errors import ModelError
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights, shapes, weights_of
from tests.model.shapes import CONFIGS, ids_of, model_of


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_by_arithmetic_are_those_of_the_model_in_its_order(name):
    model = model_of(CONFIGS[name])
    assert list(shapes(CONFIGS[name]).items()) == [
        (name, tuple(tensor.shape)) for name, tensor in weights_of(model)
    ]


@pytest.mark.parametrize("name", ["tied", "all at once", "multi-head"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loaded_weights_give_the_same_logits(name, device):
    config = CONFIGS[name]
    source, ids = model_of(config), ids_of(config, 2, 20)
    with torch.device(device):
        target = Llama(config)
    load_weights(target, weights_of(source))
    assert torch.equal(target(ids), source(ids))
    assert (target.lm_head.weight is target.model.embed_tokens.weight) == config.tie_word_embeddings


def test_a_model_in_memory_keeps_its_storage_and_a_meta_model_adopts_without_copying():
    config = CONFIGS["grouped"]
    source = model_of(config)
    real = Llama(config)
    before = real.lm_head.weight.data_ptr()
    load_weights(real, weights_of(source))
    assert real.lm_head.weight.data_ptr() == before != source.lm_head.weight.data_ptr()
    with torch.device("meta"):
        adopting = Llama(config)
    load_weights(adopting, weights_of(source))
    assert adopting.lm_head.weight.data_ptr() == source.lm_head.weight.data_ptr()


def test_a_meta_model_in_half_precision_adopts_rounded_tensors():
    config = CONFIGS["tied"]
    source = model_of(config)
    with torch.device("meta"):
        target = Llama(config).to(torch.bfloat16)
    load_weights(target, weights_of(source))
    assert torch.equal(target.model.norm.weight, source.model.norm.weight.bfloat16())


def altered(name: str, change) -> Weights:
    """Weights of a config with one fault."""
    tensors = dict(weights_of(model_of(CONFIGS[name])))
    change(tensors)
    return Weights(CONFIGS[name], tensors.items())


Q = "model.layers.0.self_attn.q_proj.weight"
FAULTS = {
    "missing": (
        lambda tensors: tensors.pop(Q),
        f"the weights lack {Q}, which a model of this config has",
    ),
    "several missing": (
        lambda tensors: (tensors.pop(Q), tensors.pop("model.norm.weight")),
        f"the weights lack {Q} and 1 others",
    ),
    "unknown": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_prj.weight": tensors[Q]}),
        f"model.layers.0.self_attn.q_prj.weight is in the weights, but not in a model of this config. "
        f"Did you mean '{Q}'?",
    ),
    "shape": (
        lambda tensors: tensors.update({Q: torch.zeros(32, 31)}),
        f"{Q} has shape (32, 31), expected (32, 32) by the config",
    ),
    "packed": (
        lambda tensors: tensors.update({Q: Packed("int8", torch.zeros(1), torch.zeros(1), (32, 32))}),
        f"{Q} is packed as int8, expected plain numbers; unpack it first",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_the_tensor_what_was_expected_and_what_came(fault):
    change, message = FAULTS[fault]
    with pytest.raises(ModelError, match=re.escape(message)):
        load_weights(Llama(CONFIGS["multi-head"]), altered("multi-head", change))


def test_a_tensor_given_twice_is_refused():
    pairs = list(weights_of(model_of(CONFIGS["grouped"])))
    with pytest.raises(ModelError, match=r"norm\.weight occurs twice"):
        load_weights(
            Llama(CONFIGS["grouped"]), Weights(CONFIGS["grouped"], [*pairs[:-1], pairs[-2], pairs[-1]])
        )


def test_a_head_beside_tied_embeddings_is_refused():
    extra = altered("tied", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 32)}))
    with pytest.raises(ModelError, match=r"the config ties it to model\.embed_tokens\.weight"):
        load_weights(Llama(CONFIGS["tied"]), extra)

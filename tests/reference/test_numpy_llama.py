"""The reference itself: its gradients by hand against finite differences, and a value worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.reference import numpy_llama

CONFIG = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 4,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
}


def weights_of(rng, tied):
    D, F, V, N, K, H = 6, 10, 11, 4, 2, 4
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(2):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (D,)
        rows = {"q": N * H, "k": K * H, "v": K * H}
        for name, out in rows.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, D)
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (D, N * H)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (F, D)
        shapes[f"{at}.mlp.gate_proj.bias"] = (F,)
        shapes[f"{at}.mlp.down_proj.weight"] = (D, F)
    return {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_by_hand_are_the_slopes_of_the_loss(tied, window):
    config = {**CONFIG, "sliding_window": window}
    rng = np.random.default_rng(0)
    weights = weights_of(rng, tied)
    ids, targets = rng.integers(0, 11, (2, 2, 7))
    documents = np.array([[0, 0, 0, 1, 1, 1, 1], [5] * 7])
    trained = rng.random((2, 7)) < 0.7

    def loss():
        logits, tape = numpy_llama.forward(config, weights, ids, documents=documents)
        return (*numpy_llama.cross_entropy(logits, targets, trained), tape)

    _, d_logits, tape = loss()
    gradients = numpy_llama.backward(config, weights, tape, d_logits)
    assert gradients.keys() == weights.keys()
    for name, array in weights.items():
        direction = rng.normal(size=array.shape)
        step = 1e-5
        weights[name] = array + step * direction
        above = loss()[0]
        weights[name] = array - step * direction
        below = loss()[0]
        weights[name] = array
        slope = (above - below) / (2 * step)
        assert slope == pytest.approx((gradients[name] * direction).sum(), rel=1e-6, abs=1e-8), name


def test_one_layer_by_hand():
    """Width 2, one head, one token: attention returns v, and every step is small enough for paper.

    x = (3, 4); mean square 12.5; all matrices the identity, the gate twice that, gains one, ε zero.
    """
    one = np.eye(2)
    config = {**CONFIG, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config |= {"head_dim": 2, "rms_norm_eps": 0.0, "rope_scaling": {"rope_type": "default"}}
    at = "model.layers.0"
    weights = {"model.embed_tokens.weight": np.array([[3.0, 4.0]]), "lm_head.weight": one}
    weights |= {f"{at}.self_attn.{name}_proj.weight": one for name in "qkvo"}
    weights |= {f"{at}.mlp.{name}_proj.weight": one for name in ("up", "down")}
    weights[f"{at}.mlp.gate_proj.weight"] = 2 * one
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{at}.{norm}.weight"] = np.ones(2)
    weights["model.norm.weight"] = np.ones(2)

    logits, _ = numpy_llama.forward(config, weights, np.array([[0]]))

    # Direction is kept by each step but the last product; so the second norm gives (3, 4)/√12.5 again.
    a, b = 3 / math.sqrt(12.5), 4 / math.sqrt(12.5)
    x = [3 + a + 2 * a * a / (1 + math.exp(-2 * a)), 4 + b + 2 * b * b / (1 + math.exp(-2 * b))]
    scale = math.sqrt((x[0] ** 2 + x[1] ** 2) / 2)
    assert logits[0, 0] == pytest.approx([x[0] / scale, x[1] / scale], abs=1e-14)

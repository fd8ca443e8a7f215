"""A Llama in NumPy and float64, from ids to gradients, written from the papers and sharing nothing with puna.

It is meant to be read beside the formulas, not to be fast. `config` is a plain dictionary with the names of
Hugging Face's `config.json`, `weights` a dictionary of arrays under Hugging Face's names.

    logits, tape = forward(config, weights, ids)
    loss, d_logits = cross_entropy(logits, targets, trained)
    gradients = backward(config, weights, tape, d_logits)

B batch, T positions, S positions attended to, D width, N query heads, K key/value heads, H head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np


def frequencies(config, length):
    """RoPE's H/2 frequencies for a sequence of `length` positions, and the factor on cosines and sines."""
    width, base = config["head_dim"], config["rope_theta"]
    scaling = config["rope_scaling"]
    kind = scaling["rope_type"]
    pair = np.arange(width // 2)
    plain = base ** (-2.0 * pair / width)
    if kind == "default":
        return plain, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":
        stretch = max(1.0, factor * length / config["max_position_embeddings"] - (factor - 1))
        return (base * stretch ** (width / (width - 2))) ** (-2.0 * pair / width), 1.0
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return keep * plain + (1 - keep) * plain / factor, 1.0

    assert kind == "yarn"

    def pair_with(wanted_turns):
        return (
            width
            * math.log(scaling["original_max_position_embeddings"] / (2 * math.pi * wanted_turns))
            / (2 * math.log(base))
        )

    first, last = pair_with(scaling.get("beta_fast", 32)), pair_with(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    keep = 1 - np.clip((pair - first) / max(last - first, 1e-3), 0, 1)

    def magnitude(scale):
        return 1 + 0.1 * scale * math.log(factor)

    on_cosines = scaling.get("attention_factor")
    if on_cosines is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        on_cosines = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    elif on_cosines is None:
        on_cosines = magnitude(1)
    return keep * plain + (1 - keep) * plain / factor, on_cosines


def angles(config, positions, documents):
    """Cosines and sines, each (B, T, 1, H/2); a sequence is as long as its last position says."""
    cos = np.empty((*positions.shape, 1, config["head_dim"] // 2))
    sin = np.empty_like(cos)
    for b, t in np.ndindex(*positions.shape):
        mine = documents[b] == documents[b, t]
        turn, factor = frequencies(config, positions[b][mine].max() + 1)
        cos[b, t, 0] = factor * np.cos(positions[b, t] * turn)
        sin[b, t, 0] = factor * np.sin(positions[b, t] * turn)
    return cos, sin


def rotate(x, cos, sin):
    """Turn the pairs (i, i + H/2) of x (B, T, N, H)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def linear(weights, name, x):
    """x · Wᵀ + b."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rms_norm(gain, x, eps):
    """x / √(mean(x²) + ε) · gain, and the 1/√."""
    scale = 1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return x * scale * gain, scale


def sigmoid(x):
    """1 / (1 + e⁻ˣ)."""
    return 1 / (1 + np.exp(-x))


def forward(config, weights, ids, positions=None, documents=None):
    """Logits (B, T, V) for ids (B, T), and what `backward` needs."""
    B, T = ids.shape
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps = config["rms_norm_eps"]
    if positions is None:
        positions = np.broadcast_to(np.arange(T), (B, T))
    if documents is None:
        documents = np.zeros((B, T), dtype=int)
    cos, sin = angles(config, positions, documents)
    visible = (documents[:, :, None] == documents[:, None, :]) & np.tri(T, dtype=bool)  # (B, T, S)
    if config.get("sliding_window"):
        visible &= positions[:, :, None] - positions[:, None, :] < config["sliding_window"]
    table = weights["model.embed_tokens.weight"]
    x = table[ids]  # (B, T, D)
    tape = {"ids": ids, "cos": cos, "sin": sin, "layers": []}
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}"
        a, a_scale = rms_norm(weights[f"{at}.input_layernorm.weight"], x, eps)
        q = rotate(linear(weights, f"{at}.self_attn.q_proj", a).reshape(B, T, N, H), cos, sin)
        k = rotate(linear(weights, f"{at}.self_attn.k_proj", a).reshape(B, T, K, H), cos, sin)
        v = linear(weights, f"{at}.self_attn.v_proj", a).reshape(B, T, K, H)
        q = q.reshape(B, T, K, N // K, H)  # query head n reads key/value head n // (N/K)
        scores = np.einsum("btkgh,bskh->bkgts", q, k) / math.sqrt(H)
        scores = np.where(visible[:, None, None], scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)  # (B, K, N/K, T, S)
        o = np.einsum("bkgts,bskh->btkgh", p, v).reshape(B, T, N * H)
        y = x + linear(weights, f"{at}.self_attn.o_proj", o)
        m, m_scale = rms_norm(weights[f"{at}.post_attention_layernorm.weight"], y, eps)
        gate, up = linear(weights, f"{at}.mlp.gate_proj", m), linear(weights, f"{at}.mlp.up_proj", m)
        h = gate * sigmoid(gate) * up  # (B, T, F)
        tape["layers"].append((x, a, a_scale, q, k, v, p, o, y, m, m_scale, gate, up, h))
        x = y + linear(weights, f"{at}.mlp.down_proj", h)
    z, z_scale = rms_norm(weights["model.norm.weight"], x, eps)
    tape["last"] = (x, z, z_scale)
    return z @ weights.get("lm_head.weight", table).T, tape


def cross_entropy(logits, targets, trained=None):
    """The sum over trained positions of -log p(target), and its gradient (B, T, V)."""
    trained = np.ones(targets.shape, dtype=bool) if trained is None else trained
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    hit = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    d_logits = np.exp(log_p)
    np.put_along_axis(d_logits, targets[..., None], np.exp(hit)[..., None] - 1, axis=-1)
    return -(hit * trained).sum(), d_logits * trained[..., None]


def linear_backward(weights, gradients, name, x, d_y):
    """Store the gradients of W and b; return that of x."""
    gradients[f"{name}.weight"] = np.einsum("bto,bti->oi", d_y, x)
    if f"{name}.bias" in weights:
        gradients[f"{name}.bias"] = d_y.sum(axis=(0, 1))
    return d_y @ weights[f"{name}.weight"]


def rms_norm_backward(weights, gradients, name, x, scale, d_y):
    """Store the gradient of the gain; return that of x."""
    gradients[name] = (d_y * x * scale).sum(axis=(0, 1))
    u = d_y * weights[name]
    return scale * u - scale**3 * x * (u * x).mean(axis=-1, keepdims=True)


def backward(config, weights, tape, d_logits):
    """The gradient of every weight, by name; a tied table gets the sum of its two uses."""
    B, T, _ = d_logits.shape
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    cos, sin = tape["cos"], tape["sin"]
    table = weights["model.embed_tokens.weight"]
    gradients = {"model.embed_tokens.weight": np.zeros_like(table)}
    x, z, z_scale = tape["last"]
    tied = "lm_head.weight" not in weights
    gradients["model.embed_tokens.weight" if tied else "lm_head.weight"] = np.einsum(
        "btv,btd->vd", d_logits, z
    )
    d_z = d_logits @ (table if tied else weights["lm_head.weight"])
    d_x = rms_norm_backward(weights, gradients, "model.norm.weight", x, z_scale, d_z)
    for index in reversed(range(config["num_hidden_layers"])):
        at = f"model.layers.{index}"
        x, a, a_scale, q, k, v, p, o, y, m, m_scale, gate, up, h = tape["layers"][index]

        d_h = linear_backward(weights, gradients, f"{at}.mlp.down_proj", h, d_x)
        s = sigmoid(gate)
        d_gate = d_h * up * s * (1 + gate * (1 - s))
        d_up = d_h * gate * s
        d_m = linear_backward(weights, gradients, f"{at}.mlp.gate_proj", m, d_gate)
        d_m += linear_backward(weights, gradients, f"{at}.mlp.up_proj", m, d_up)
        d_y = d_x + rms_norm_backward(
            weights, gradients, f"{at}.post_attention_layernorm.weight", y, m_scale, d_m
        )

        d_o = linear_backward(weights, gradients, f"{at}.self_attn.o_proj", o, d_y).reshape(q.shape)
        d_v = np.einsum("bkgts,btkgh->bskh", p, d_o)
        d_p = np.einsum("btkgh,bskh->bkgts", d_o, v)
        d_scores = p * (d_p - (d_p * p).sum(axis=-1, keepdims=True)) / math.sqrt(H)
        d_q = np.einsum("bkgts,bskh->btkgh", d_scores, k).reshape(B, T, N, H)
        d_k = np.einsum("bkgts,btkgh->bskh", d_scores, q)
        # Turning is linear; its transpose turns back (and scales alike, where cosines carry a factor).
        d_a = linear_backward(
            weights, gradients, f"{at}.self_attn.q_proj", a, rotate(d_q, cos, -sin).reshape(B, T, N * H)
        )
        d_a += linear_backward(
            weights, gradients, f"{at}.self_attn.k_proj", a, rotate(d_k, cos, -sin).reshape(B, T, K * H)
        )
        d_a += linear_backward(weights, gradients, f"{at}.self_attn.v_proj", a, d_v.reshape(B, T, K * H))
        d_x = d_y + rms_norm_backward(weights, gradients, f"{at}.input_layernorm.weight", x, a_scale, d_a)
    np.add.at(gradients["model.embed_tokens.weight"], tape["ids"], d_x)
    return gradients

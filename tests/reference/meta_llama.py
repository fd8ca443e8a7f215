"""Meta's Llama over model-parallel ranks, in NumPy and float64, written from the papers.

It shares nothing with puna. Every rank holds its share of the matrices and computes with that alone. Where
Meta's ranks would talk to each other, shares are put side by side (after a matrix cut by rows) or summed
(after one cut by columns). Rotary positions turn neighbouring pairs of dimensions as complex numbers.

B batch, T positions, D width, N query heads, K key/value heads, H head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np


def turns(params, scaling, length):
    """exp(i · t · θ^(-2j/H)) for positions t and pairs j: (T, H/2)."""
    width = params["dim"] // params["n_heads"]
    frequencies = params.get("rope_theta", 10000.0) ** (-np.arange(0, width, 2) / width)
    if params.get("use_scaled_rope"):
        frequencies = np.array([scaled(f, **scaling) for f in frequencies])
    return np.exp(1j * np.outer(np.arange(length), frequencies))


def scaled(frequency, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's rule for one frequency."""
    wavelength = 2 * math.pi / frequency
    if wavelength < original_max_position_embeddings / high_freq_factor:
        return frequency
    if wavelength > original_max_position_embeddings / low_freq_factor:
        return frequency / factor
    smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (
        high_freq_factor - low_freq_factor
    )
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotated(x, turn):
    """(B, T, heads, H): dimensions 2j and 2j + 1 are one complex number."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    product = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[None, :, None]
    return np.stack([product.real, product.imag], axis=-1).reshape(x.shape)


def normed(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def attention(rank, prefix, x, turn, heads, kv_heads):
    """One rank's heads of (B, T, D), before the sum over ranks."""
    B, T, _ = x.shape
    q, k, v = (
        (x @ rank[f"{prefix}.{name}.weight"].T).reshape(B, T, count, -1)
        for name, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
    )
    q, k = rotated(q, turn), rotated(k, turn)
    k, v = (np.repeat(y, heads // kv_heads, axis=2) for y in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, v).reshape(B, T, -1) @ rank[f"{prefix}.wo.weight"].T


def feed_forward(rank, prefix, x):
    """One rank's share of the feed-forward layer, before the sum over ranks."""
    gate = x @ rank[f"{prefix}.w1.weight"].T
    up = x @ rank[f"{prefix}.w3.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ rank[f"{prefix}.w2.weight"].T


def embedded(ranks, ids, width):
    """(B, T, D): by columns up to Llama 2; since Llama 3 a rank knows a range of the vocabulary."""
    tables = [rank["tok_embeddings.weight"] for rank in ranks]
    if tables[0].shape[1] != width:
        return np.concatenate([table[ids] for table in tables], axis=-1)
    rows = tables[0].shape[0]
    return sum(
        np.where((ids // rows == number)[..., None], table[ids % rows], 0.0)
        for number, table in enumerate(tables)
    )


def logits(params, ranks, ids, scaling=None):
    """(B, T, V) of ids (B, T); `ranks` are dictionaries of arrays under Meta's names."""
    ranks = [{name: array.astype(np.float64) for name, array in rank.items()} for rank in ranks]
    eps, heads = params["norm_eps"], params["n_heads"]
    kv_heads = params.get("n_kv_heads") or heads
    turn = turns(params, scaling, ids.shape[1])
    x = embedded(ranks, ids, params["dim"])
    for layer in range(params["n_layers"]):
        name = f"layers.{layer}"
        h = normed(x, ranks[0][f"{name}.attention_norm.weight"], eps)
        share = heads // len(ranks), kv_heads // len(ranks)
        x = x + sum(attention(rank, f"{name}.attention", h, turn, *share) for rank in ranks)
        h = normed(x, ranks[0][f"{name}.ffn_norm.weight"], eps)
        x = x + sum(feed_forward(rank, f"{name}.feed_forward", h) for rank in ranks)
    x = normed(x, ranks[0]["norm.weight"], eps)
    return np.concatenate([x @ rank["output.weight"].T for rank in ranks], axis=-1)

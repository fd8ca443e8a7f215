"""llama2.c's files read and run in plain NumPy, token after token, as run.c and runq.c do it.

Shares nothing with the package: offsets advance as the file is read, neighbouring pairs are turned.
`B` is always one; `T` positions, `D` width, `N` heads, `K` key/value heads, `H` head width, `F` inner width.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def read(path: Path) -> dict[str, Any]:
    """Sizes and float32 arrays, those of a kind stacked over layers."""
    data = path.read_bytes()
    versioned = data[:4] == b"24ka"
    version = struct.unpack_from("<i", data, 4)[0] if versioned else 0
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data, 8 * versioned)
    shared = bool(data[36]) if versioned else vocab > 0
    group = struct.unpack_from("<i", data, 37)[0] if version == 2 else 0
    vocab, kv = abs(vocab), dim // heads * kv_heads
    at = 256 if versioned else 28

    def floats(*shape: int) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(data, "<f4", int(np.prod(shape)), at).reshape(shape)
        at += values.nbytes
        return values

    def matrix(*shape: int) -> np.ndarray:
        """One matrix of version 2: whole numbers, then a scale for each group of them."""
        nonlocal at
        count = int(np.prod(shape))
        whole = np.frombuffer(data, "i1", count, at).astype(np.float32)
        at += count
        return (whole.reshape(-1, group) * floats(count // group)[:, None]).reshape(shape)

    def stack(*shape: int) -> np.ndarray:
        return np.stack([matrix(*shape) for _ in range(layers)]) if version == 2 else floats(layers, *shape)

    table = matrix if version == 2 else floats
    shapes = [(dim, dim), (kv, dim), (kv, dim), (dim, dim), (hidden, dim), (dim, hidden), (hidden, dim)]
    found: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "context": context}
    if version == 0:
        found["embedding"] = floats(vocab, dim)
        found["attention_norm"] = floats(layers, dim)
        found |= {name: stack(*shape) for name, shape in zip(MATRICES[:4], shapes[:4], strict=True)}
        found["ffn_norm"] = floats(layers, dim)
        found |= {name: stack(*shape) for name, shape in zip(MATRICES[4:], shapes[4:], strict=True)}
        found["norm"] = floats(dim)
        found["cos"], found["sin"] = floats(context, dim // heads // 2), floats(context, dim // heads // 2)
    else:
        found["attention_norm"], found["ffn_norm"] = floats(layers, dim), floats(layers, dim)
        found["norm"], found["embedding"] = floats(dim), table(vocab, dim)
        found |= {name: stack(*shape) for name, shape in zip(MATRICES, shapes, strict=True)}
    found["head"] = found["embedding"] if shared else table(vocab, dim)
    assert at == len(data)
    return found


def logits(model: dict[str, Any], ids: list[int]) -> np.ndarray:
    """Logits (T, V) of one sequence, in float64."""
    N, K = model["heads"], model["kv_heads"]
    layers = len(model["attention_norm"])
    keys: list[list[np.ndarray]] = [[] for _ in range(layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(layers)]
    rows = []
    for position, index in enumerate(ids):
        x = model["embedding"][index].astype(np.float64)  # (D,)
        H = len(x) // N
        for layer in range(layers):
            h = norm(x, model["attention_norm"][layer])
            q, k, v = (
                (model[name][layer] @ h).reshape(heads, H)
                for name, heads in (("wq", N), ("wk", K), ("wv", K))
            )
            keys[layer].append(turn(k, position))
            values[layer].append(v)
            q, heard = turn(q, position), np.zeros((N, H))
            for head in range(N):
                group = head // (N // K)
                scores = np.array([q[head] @ k[group] for k in keys[layer]]) / np.sqrt(H)  # (T,)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heard[head] = sum(w * v[group] for w, v in zip(weights, values[layer], strict=True))
            x = x + model["wo"][layer] @ heard.reshape(-1)
            h = norm(x, model["ffn_norm"][layer])
            gate, up = model["w1"][layer] @ h, model["w3"][layer] @ h  # (F,)
            x = x + model["w2"][layer] @ (gate / (1 + np.exp(-gate)) * up)
        rows.append(model["head"] @ norm(x, model["norm"]))
    return np.stack(rows)


def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(D,)."""
    return x / np.sqrt((x * x).mean() + 1e-5) * gain


def turn(x: np.ndarray, position: int) -> np.ndarray:
    """(heads, H): each neighbouring pair turned by its own angle."""
    out = x.copy()
    for i in range(0, x.shape[1], 2):
        angle = position / 10_000.0 ** (i / x.shape[1])
        out[:, i] = x[:, i] * np.cos(angle) - x[:, i + 1] * np.sin(angle)
        out[:, i + 1] = x[:, i] * np.sin(angle) + x[:, i + 1] * np.cos(angle)
    return out

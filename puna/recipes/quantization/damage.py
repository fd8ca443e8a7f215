"""What a quantization does to a model, in figures: for puna.json, and as tables for people.

"numbers" are figures with the numbers as files hold them, "engine" with the products as Puna's engine
computes them, whose inputs are rounded to whole numbers where the matrix is int8 or int4. The engine's are
what users get, and come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from puna.formats.proof.divergence import Divergence
from puna.progress import quantity

PRIMARY = "engine"
WORST = 5
_HEADS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
_SHORT = {**_HEADS, "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_KEPT = "-"


def figures_of(found: Divergence) -> dict[str, Any]:
    """Of logits against the source's; perplexities where the text has targets."""
    before, after = (None if loss is None else math.exp(loss) for loss in (found.loss_a, found.loss_b))
    change = None if before is None or after is None else 100 * (after / before - 1)
    return {
        "kl": found.kl_mean,
        "kl_p999": found.kl_p999,
        "kl_max": found.kl_max,
        "top1_agreement": found.top1_agreement,
        "logits_relative_error": found.relative_error,
        "perplexity": after,
        "perplexity_of_source": before,
        "perplexity_change_percent": change,
    }


def worst(layers: Sequence[Mapping[str, Any]], fitted: bool) -> list[dict[str, Any]]:
    """The layers that change the hidden states most by themselves, the worst first, and what would help.

    Where matrices were `fitted` to text only gptq's are blamed: the others are off on purpose, to make good
    what was lost before them. Empty where nothing was measured, or nobody is to blame.
    """
    blamed = [
        {name: about for name, about in layer["matrices"].items() if not fitted or about["scheme"] == "gptq"}
        for layer in layers
    ]
    measured = [pair for pair in zip(layers, blamed, strict=True) if pair[0].get("own", 0) > 0 and pair[1]]
    ranked = sorted(measured, key=lambda pair: -pair[0]["own"])[:WORST]
    return [_suffering(*pair) for pair in ranked]


def _suffering(layer: Mapping[str, Any], matrices: Mapping[str, Any]) -> dict[str, Any]:
    matrix = max(matrices, key=lambda name: matrices[name][PRIMARY])
    about = matrices[matrix]
    better = "int8" if about["scheme"] in ("int4", "gptq") else "keep"
    return {
        "layer": layer["layer"],
        "own": layer["own"],
        "matrix": matrix,
        "error": about[PRIMARY],
        "advice": f"--except '*.layers.{layer['layer']}.*.{matrix}={better}'",
    }


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record of a quantization, for people."""
    yield from _table(record["layers"])
    for place in record["worst"]:
        yield (
            f"suffers most  layer {place['layer']}: {place['own']:.2%} by itself, {place['matrix']} "
            f"{place['error']:.2%}; would help: {place['advice']}"
        )
    yield from summary(record)


def summary(record: Mapping[str, Any]) -> Iterator[str]:
    """What a record says of the whole model."""
    size = record["size"]
    yield (
        f"size          {quantity(size['before'])}B before, {quantity(size['after'])}B after: "
        f"{size['bits_per_weight']:.2f} bits per weight over all, "
        f"{size['bits_per_quantized_weight']:.2f} in the {size['quantized_matrices']} matrices quantized"
    )
    text = record["text"]
    if PRIMARY not in record:
        return
    yield f"measured on   {text['measured_sequences']} × {text['length']} tokens of {text['origin']}"
    for kind, about in (("engine", "as the engine computes"), ("numbers", "numbers as stored")):
        yield f"{about:24} {_figures(record[kind])}"


def _figures(found: Mapping[str, Any]) -> str:
    text = f"KL {found['kl']:.2e} nats per token, first choice the same after {found['top1_agreement']:.2%}"
    if found["perplexity"] is None:
        return text
    before, after, change = (
        found[key] for key in ("perplexity_of_source", "perplexity", "perplexity_change_percent")
    )
    return f"perplexity {before:.4f} → {after:.4f} ({change:+.3f}%), {text}"


def _table(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Errors of products, a row for each layer; of the weights alone where no text was measured."""
    kind = PRIMARY if any("own" in layer for layer in layers) else "weights"
    what = "products with the source's inputs" if kind == PRIMARY else "weights"
    yield f"Relative error of {what}, in %; then of the hidden states: this layer alone, and all up to here"
    columns = [*_SHORT.values(), "alone", "so far"]
    yield "layer " + "".join(f"{column:>8}" for column in columns)
    for layer in layers:
        cells = [_cell(layer["matrices"].get(name), kind) for name in _SHORT]
        states = (layer.get("own"), layer.get("hidden", {}).get(PRIMARY))
        cells += [_KEPT if value is None else f"{100 * value:.3f}" for value in states]
        yield f"{layer['layer']:<6}" + "".join(f"{cell:>8}" for cell in cells)


def _cell(matrix: Mapping[str, Any] | None, kind: str) -> str:
    return _KEPT if matrix is None else f"{100 * matrix[kind]:.3f}"

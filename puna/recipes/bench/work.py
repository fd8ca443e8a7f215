"""What a model is made of, as benchmarks count it: bits per weight, and operations on whole numbers."""

from __future__ import annotations

from torch import nn

from puna.model.counts import parameters
from puna.model.llama import Llama
from puna.quantize.packed import PackedLinear
from puna.recipes.bench.model import Subject

WHOLE = ("int8", "int4")
"""Kinds of matrices whose products are between whole numbers, of eight bits in either case."""


def bits_per_weight(subject: Subject) -> float:
    """Of the weights that a step reads, with their scales: see `Subject.step_bytes`."""
    config = subject.model.config
    counts = parameters(config)
    read = counts.total if config.tie_word_embeddings else counts.total - counts.embedding
    return 8 * subject.step_bytes / read


def has_whole_numbers(model: Llama) -> bool:
    """Whether any product of the model is between whole numbers."""
    return _whole_weights(model) > 0


def whole_operations(model: Llama, count: int, heads: int) -> float:
    """Those of `flops_of` that are on whole numbers: for `count` tokens, `heads` of them with logits."""
    output = _whole_weights(model.get_submodule("lm_head"))
    layers = _whole_weights(model) - output
    return 2.0 * (count * layers + heads * output)


def _whole_weights(module: nn.Module) -> int:
    return sum(
        matrix.inputs * matrix.outputs
        for part in module.modules()
        if isinstance(part, PackedLinear)
        for matrix in part.matrices()
        if matrix.kind in WHOLE
    )

"""One layer's matrices, quantized one after another, and what that does to the text that passes through.

Texts pass as `HiddenStates`: `source` through the source's layers, `numbers` through the quantized ones with
the numbers as files hold them, `engine` also with the products as the engine computes them, whose inputs are
whole numbers. `fitted` is the text that gptq fits to; it passes through the quantized layers too, so that
each matrix makes good what those before it did (arXiv 2210.17323). `aimed` is the same text on its way
through the source: what the products of a matrix should come to, or, where they are added to the stream of
states, what the stream should come to. Matrices beside gptq's that are rounded to nearest take the same aim.

    B sequences   T positions   R rows (B · T)   D width   I inputs   O outputs
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from puna.model.llama import Block
from puna.model.weights import Packed
from puna.quantize.codes import expand
from puna.quantize.gptq import Gptq, GptqSettings
from puna.quantize.matrices import in_panels, suits
from puna.quantize.packed import PackedLinear
from puna.quantize.recipe import Choice
from puna.quantize.schemes import quantized
from puna.recipes.quantization.hidden_states import HiddenStates, relative_distance

Told = Callable[[float, str], None]
"""Takes a share of the layer's work, and what is worked on now."""

Angles = tuple[Tensor, Tensor, Tensor | None]
"""Cosines and sines (1, T, H), and the first key that each query sees, (1, T)."""

STAGES = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""The matrices of a layer in the order of their products; those of one stage take the same input."""

_ADDED = ("o_proj", "down_proj")  # their products are added to the stream of states
MATRICES = tuple(name for _, names in STAGES for name in names)
_SAMPLED = 1024  # rows on which a matrix's own error is measured
_ROUNDED = ("int8", "int4")  # schemes whose products take whole numbers


@dataclass(frozen=True)
class Texts:
    """What passes through the layers; None where there is no such text."""

    source: HiddenStates | None
    numbers: HiddenStates | None
    engine: HiddenStates | None
    fitted: HiddenStates | None
    aimed: HiddenStates | None

    def __iter__(self) -> Iterator[HiddenStates]:
        every = (self.source, self.numbers, self.engine, self.fitted, self.aimed)
        return (text for text in every if text is not None)


@dataclass(frozen=True)
class Layer:
    """A layer with the source's numbers, which `quantize_layer` replaces.

    `choices` are by the matrices' names, without those that stay as they are; `angles` by length of sequence.
    """

    block: Block
    name: str
    choices: Mapping[str, Choice]
    gptq: GptqSettings
    angles: Callable[[int], Angles]

    def whole(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        found: Tensor = self.block(x, *self.angles(x.shape[1]))
        return found

    def half(self, parent: str, x: Tensor) -> Tensor:
        """The first (self_attn) or the second half (mlp) of the layer: (B, T, D) → (B, T, D)."""
        block = self.block
        if parent == "mlp":
            return x + block.mlp(block.post_attention_layernorm(x))
        return x + block.self_attn(block.input_layernorm(x), *self.angles(x.shape[1]), None)

    def linear(self, parent: str, name: str) -> nn.Linear:
        """One of its matrices' layers."""
        found = self.block.get_submodule(f"{parent}.{name}")
        assert isinstance(found, nn.Linear)
        return found


@torch.no_grad()
def quantize_layer(
    layer: Layer, texts: Texts, before: str, after: str, is_last: bool, told: Told
) -> tuple[dict[str, Packed], dict[str, Any]]:
    """Quantize a layer's matrices in place, and take all texts from one place to the next.

    Returns:
        The packed matrices by their names in the layer, and the figures: of each matrix the relative error of
        its numbers ("weights") and of its products with inputs of the source ("numbers", "engine"); of the
        hidden states after the layer ("hidden"); and what this layer alone does to them ("own").
    """
    samples, own = _source_pass(layer, texts.source, before, after)
    original = None if texts.aimed is None else replace(layer, block=copy.deepcopy(layer.block))
    told(0.1, "measured")
    packed: dict[str, Packed] = {}
    figures: dict[str, Any] = {"matrices": {}}
    for stage, (parent, names) in enumerate(STAGES):
        chosen = [name for name in names if f"{parent}.{name}" in layer.choices]
        fitting = _fitting(layer, original, parent, chosen, texts, _place(before, parent))
        for name in chosen:
            key = f"{parent}.{name}"
            linear, choice = layer.linear(parent, name), layer.choices[key]
            packed[key] = _packed(linear.weight, choice, fitting, f"{layer.name}.{key}")
            figures["matrices"][name] = {
                "scheme": choice.scheme,
                **_replace(linear, packed[key], samples.get(stage)),
            }
            told(0.6 / len(MATRICES), name)
        del fitting
        ends_half = stage + 1 == len(STAGES) or STAGES[stage + 1][0] != parent
        if ends_half and not (is_last and parent == "mlp"):
            end = after if parent == "mlp" else _place(before, "mlp")
            for text, through in ((texts.fitted, layer), (texts.aimed, original)):
                if text is not None and through is not None:
                    text.advance(_place(before, parent), end, partial(through.half, parent))
    told(0.1, "measuring")
    figures |= _passes(layer, packed, texts, before, after, own)
    told(0.2, "done")
    return packed, figures


def in_whole_numbers(x: Tensor, groups: int) -> Tensor:
    """What a product with int8 or int4 takes of its inputs (…, I), one scale for each row and group.

    s = max|x| / 127, q = x / s to the nearest, half to even; a value is s · q. The engine sums whole numbers
    and multiplies by scales after that, which differs from a product with these by rounding of float32.
    """
    parts = x.unflatten(-1, (groups, -1))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    whole = (parts / torch.where(scale == 0, 1, scale)).round().clamp(-127, 127)
    return (whole * scale).flatten(-2)


def takes_whole_numbers(packed: Packed) -> bool:
    """Whether the engine's products with a matrix round their inputs."""
    return packed.scheme in _ROUNDED


def groups_of(packed: Packed) -> int:
    """Scales of a row."""
    assert packed.scales is not None
    return packed.scales.shape[1]


def _source_pass(
    layer: Layer, text: HiddenStates | None, before: str, after: str
) -> tuple[dict[int, Tensor], tuple[Tensor, Tensor] | None]:
    """Take the source's text through the layer; of its first part the inputs of each stage, (R, I), and the
    states before and after the layer.
    """
    if text is None:
        return {}, None
    samples: dict[int, Tensor] = {}
    first = text.read(before, text.parts[0])
    with _kept_inputs(layer, samples):
        own = first, layer.whole(first)
    text.advance(before, after, layer.whole)
    return samples, own


@contextmanager
def _kept_inputs(layer: Layer, samples: dict[int, Tensor]) -> Iterator[None]:
    def keep(stage: int, module: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].flatten(0, -2)
        samples[stage] = rows[:: -(-len(rows) // _SAMPLED)].clone()

    handles = [
        layer.linear(parent, names[0]).register_forward_pre_hook(partial(keep, stage))
        for stage, (parent, names) in enumerate(STAGES)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(before: str, parent: str) -> str:
    """Where a half of a layer begins."""
    return before if parent == "self_attn" else f"{before}-half"


class _ReachedError(Exception):
    """A pass came to the product whose inputs were wanted."""


def _fitting(
    layer: Layer, original: Layer | None, parent: str, names: list[str], texts: Texts, place: str
) -> Gptq | None:
    """What is known of the inputs of a stage; None where no text is fitted to, or nothing is rounded."""
    text, aimed = texts.fitted, texts.aimed
    if text is None or not names:
        return None
    assert original is not None and aimed is not None
    found = Gptq(layer.linear(parent, names[0]).in_features, layer.gptq)
    for part in text.parts:
        states, meant = text.read(place, part), aimed.read(place, part)
        missing = meant - states if names[0] in _ADDED else None
        rows, source = (_inputs(of, parent, names[0], x) for of, x in ((layer, states), (original, meant)))
        found.add(rows, source, missing)
    return found


def _inputs(layer: Layer, parent: str, name: str, states: Tensor) -> Tensor:
    """What one of the matrices takes (R, I) where states (B, T, D) enter its half of the layer."""
    taken: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Tensor]) -> None:
        taken.append(inputs[0].flatten(0, -2))
        raise _ReachedError

    handle = layer.linear(parent, name).register_forward_pre_hook(take)
    try:
        with contextlib.suppress(_ReachedError):
            layer.half(parent, states)
    finally:
        handle.remove()
    return taken[0]


def _packed(weight: Tensor, choice: Choice, fitting: Gptq | None, name: str) -> Packed:
    if fitting is None:
        return quantized(weight, choice.format, name)
    if choice.scheme == "gptq":
        return fitting.quantized(weight, choice.format, name)
    return quantized(fitting.aim(weight), choice.format, name)


def _replace(linear: nn.Linear, packed: Packed, rows: Tensor | None) -> dict[str, float]:
    """Put the numbers of a packed matrix into its layer; how far they, and products with rows, are off."""
    numbers, weight = expand(packed), linear.weight
    found = {"weights": _relative(numbers - weight, weight)}
    if rows is not None:
        meant = linear(rows)
    weight.copy_(numbers)
    if rows is not None:
        found["numbers"] = found["engine"] = _relative(linear(rows) - meant, meant)
        if takes_whole_numbers(packed):
            found["engine"] = _relative(_engine_linear(linear, packed)(rows) - meant, meant)
    return found


def _passes(
    layer: Layer,
    packed: Mapping[str, Packed],
    texts: Texts,
    before: str,
    after: str,
    own: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Take the measuring texts through the quantized layer, and say how far they are from the source's."""
    if texts.source is None or own is None:
        return {}
    hidden = {}
    if texts.numbers is not None:
        texts.numbers.advance(before, after, layer.whole)
        hidden["numbers"] = relative_distance(texts.source, texts.numbers, after)
    with _as_engine(layer.block, packed):
        if texts.engine is not None:
            texts.engine.advance(before, after, layer.whole)
            hidden["engine"] = relative_distance(texts.source, texts.engine, after)
        alone = layer.whole(own[0])
    hidden.setdefault("engine", hidden.get("numbers", 0.0))
    return {"hidden": hidden, "own": _relative(alone - own[1], own[1])}


@contextmanager
def _as_engine(block: nn.Module, packed: Mapping[str, Packed]) -> Iterator[None]:
    """Inside, products with int8 and int4 matrices are the engine's."""
    plain = {name: block.get_submodule(name) for name in packed if takes_whole_numbers(packed[name])}
    try:
        for name, linear in plain.items():
            assert isinstance(linear, nn.Linear)
            block.set_submodule(name, _engine_linear(linear, packed[name]))
        yield
    finally:
        for name, linear in plain.items():
            block.set_submodule(name, linear)


def _engine_linear(linear: nn.Linear, packed: Packed) -> nn.Module:
    """A layer whose product is the engine's; `linear` has the numbers of the packed matrix."""
    if suits(packed):
        return PackedLinear(in_panels(packed, bias=linear.bias))
    return _RoundingLinear(linear, groups_of(packed))


class _RoundingLinear(nn.Module):
    """The same where no code for it can be compiled, but for the order of sums."""

    def __init__(self, linear: nn.Linear, groups: int) -> None:
        super().__init__()
        self.linear, self.groups = linear, groups

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        found: Tensor = self.linear(in_whole_numbers(x, self.groups))
        return found


def _relative(difference: Tensor, signal: Tensor) -> float:
    """‖difference‖ / ‖signal‖, summed in float64 by rows; 0 where both are zero."""
    apart, size = (float(x.flatten(0, -2).square().sum(-1).double().sum()) for x in (difference, signal))
    return (apart / size) ** 0.5 if size else float(apart > 0)

"""The model that a benchmark runs: a preset with random weights, or one from a path or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import puna
from puna.engine.arriving import Arriving, quantization
from puna.engine.llm import context_length
from puna.errors import SettingsError, nearest
from puna.formats.source import Source
from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token
from puna.model.initial import initial_weights
from puna.model.llama import Llama
from puna.model.presets import PRESETS
from puna.model.weights import Weights
from puna.quantize.loading import load_quantized
from puna.quantize.packing import pack
from puna.quantize.recipe import Recipe
from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """A model in memory, and how long its sequences may be."""

    model: Llama
    tokenizer: Tokenizer | None
    context: int

    @property
    def weight_bytes(self) -> int:
        """What the weights take; a tied matrix once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def step_bytes(self) -> int:
        """What a step reads of them: all but an embedding that is not tied, of which it takes a few rows."""
        if self.model.config.tie_word_embeddings:
            return self.weight_bytes
        rows = self.model.model.embed_tokens.parameters()  # of whole numbers: their scales are among them
        return self.weight_bytes - sum(parameter.nbytes for parameter in rows)


def open_subject(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    context: int | None,
    needed: int,
    quantize: Recipe | None = None,
) -> Subject:
    """The model, packed as commands that answer have it; a preset's context grows to `needed` positions where
    nothing else is asked. `quantize`: how its matrices are rounded on the way.

    Raises:
        SettingsError: the context is too short for what is to be measured, or that of a model with its own.
        ModelError: it is no model, or cannot be quantized so.
    """
    check_name(name)
    check_context(name, context)
    if name in PRESETS:
        config = preset_config(name, context, needed)
        random = random_model(config, dtype, device, quantize)
        subject = Subject(random, None, config.max_position_embeddings)
    else:
        llm = puna.load(name, dtype=str(dtype).removeprefix("torch."), device=str(device), quantize=quantize)
        subject = Subject(llm.model, llm.tokenizer, context_length(llm.config))
    check_room(name, subject.context, needed)
    pack(subject.model)
    return subject


def check_name(name: str) -> None:
    """Raises SettingsError where a name is a path to nothing, and nearly a preset's."""
    known = name in PRESETS or "/" in name or Path(name).exists()  # with a slash it may be the hub's
    if not known and (near := nearest(name, PRESETS)):
        raise SettingsError(f"{name} is no preset, and no model is there.{near}")


def preset_config(name: str, context: int | None, needed: int) -> ModelConfig:
    """A preset whose context is the one asked for, or its own, or grows to `needed` positions."""
    own = PRESETS[name]
    length = context or max(own.max_position_embeddings, needed)
    return own.model_copy(update={"max_position_embeddings": length})


def check_context(name: str, context: int | None) -> None:
    """Raises SettingsError where a context is asked for of a model that has its own."""
    if context is not None and name not in PRESETS:
        raise SettingsError(f"context is for presets, whose weights are random; {name} has its own")


def check_room(name: str, context: int, needed: int) -> None:
    """Raises SettingsError where a context is too short for what is to be measured."""
    if context < needed:
        advice = ", or raise context" if name in PRESETS else ""
        raise SettingsError(
            f"{needed} positions are needed, and the context has {context}; lower prompt or new{advice}"
        )


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, quantize: Recipe | None = None
) -> Llama:
    """A model as training begins with it; of float32 copies there is only one tensor's at a time."""
    source = Source(Path("random weights"), "none", initial_weights(config, seed=0), torch.float32, {})
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    load_quantized(model, Weights(config, Arriving(source, device, dtype, quantization(quantize))))
    return model.eval()


def flops_of(config: ModelConfig, first: int, count: int, heads: int) -> float:
    """Floating-point operations for `count` tokens of a sequence from position `first` on.

    As `puna.model.counts` counts them, but with the output projection of only `heads` of them: an engine
    needs the logits of the rows after which it samples.
    """
    head = 2 * config.vocab_size * config.hidden_size
    whole = _flops_up_to(config, first + count) - _flops_up_to(config, first)
    return whole - head * (count - heads)


def _flops_up_to(config: ModelConfig, length: int) -> float:
    return length * flops_per_token(config, length, training=False) if length else 0.0

"""A model's hidden states, the whole model in memory or one layer at a time, with equal bits.

Both take a stream of `Weights`. Layer by layer a model costs one layer in the type of computation, whatever
its size: the embedding is read by rows, the output projection by slices of the vocabulary. What is read is
always copied, since products may round differently where a mapped file happens to be aligned differently.

    B batch   T positions   R rows (batch × positions)   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.formats.packed import expanded, plain
from puna.formats.proof.sketches import take_rows
from puna.model.attention import KERNELS, first_keys
from puna.model.config import ModelConfig
from puna.model.counts import parameters
from puna.model.llama import Block, Llama, RMSNorm
from puna.model.rope import Rope
from puna.model.weights import Packed, Weights, load_weights
from puna.progress import Tracker

_HEAD_NUMBERS = 1 << 26  # of the output projection at once: 256 MiB in float32
_LARGE = 10**8  # parameters from which on it pays to build a model without values: torch loads much for that
_LAYER = "model.layers."
_KERNEL = "fused"


@dataclass(frozen=True)
class Tokens:
    """Sequences of equal length: ids (B, T), and positions (1, T) that all of them have."""

    ids: Tensor
    positions: Tensor


@dataclass(frozen=True)
class States:
    """What a model made of tokens: normalised hidden states (B, T, D) for each, and the output projection.

    The projection (V, D) may be packed, or in the type it is stored in.
    """

    hidden: Sequence[Tensor]
    head: Tensor | Packed


def build(weights: Weights, dtype: torch.dtype, device: torch.device, tracker: Tracker) -> Llama:
    """The whole model in memory.

    Raises:
        ModelError: the weights are not those of the config, or not finite.
    """
    home = "meta" if parameters(weights.config).total > _LARGE else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(home):
        model = Llama(weights.config, _KERNEL).to(dtype).eval()
    model.to_empty(device=device)
    load_weights(model, expanded(Weights(weights.config, _told(weights, tracker))))
    return model


@torch.no_grad()
def states(model: Llama, tokens: Sequence[Tokens]) -> States:
    """The hidden states of a model in memory."""
    return States([model.model(each.ids, each.positions) for each in tokens], model.lm_head.weight.detach())


@torch.no_grad()
def streamed_states(
    weights: Weights, tokens: Sequence[Tokens], dtype: torch.dtype, device: torch.device, tracker: Tracker
) -> States:
    """The same of a model that is read once, one layer in memory at a time.

    Raises:
        ModelError: a tensor is not finite, as its reader tells.
    """
    config = weights.config
    stream = iter(_told(weights, tracker))
    _, embedding = next(stream)
    hidden = [embedded(embedding, each.ids, dtype) for each in tokens]  # (B, T, D) each
    hidden = _through_layers(config, stream, hidden, tokens, dtype)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(device, dtype)
    norm.weight.copy_(plain(next(stream)[1]))
    head = embedding if config.tie_word_embeddings else next(stream)[1]
    assert next(stream, None) is None  # and what hashes on the way has come to its end
    return States([norm(x) for x in hidden], head)


def _through_layers(
    config: ModelConfig,
    stream: Iterator[tuple[str, Tensor | Packed]],
    hidden: list[Tensor],
    tokens: Sequence[Tokens],
    dtype: torch.dtype,
) -> list[Tensor]:
    """(B, T, D) each → (B, T, D) each, through every layer in turn."""
    rope = Rope(config.rope_theta, config.head_dim, config.max_position_embeddings, config.rope_scaling)
    angles = [rope(each.positions, dtype) for each in tokens]
    starts = [first_keys(each.ids.shape[1], config.sliding_window, None, each.ids.device) for each in tokens]
    with torch.random.fork_rng(devices=[]):
        block = Block(config, KERNELS[_KERNEL]).to(hidden[0].device, dtype).eval()
    count = sum(1 for _ in block.parameters())
    for index in range(config.num_hidden_layers):
        for _ in range(count):
            name, value = next(stream)
            block.get_parameter(name.removeprefix(f"{_LAYER}{index}.")).copy_(plain(value))
        hidden = [block(x, *turns, first) for x, turns, first in zip(hidden, angles, starts, strict=True)]
    return hidden


def embedded(embedding: Tensor | Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of an embedding, plain or packed, that ids (B, T) name: (B, T, D)."""
    found = plain(take_rows(embedding, ids.flatten().cpu()))
    return found.to(ids.device, dtype).view(*ids.shape, -1)


def logits(hidden: Tensor, head: Tensor | Packed, vocabulary: int) -> Tensor:
    """(R, D) and the projection (V, D) → (R, `vocabulary`), the first so many of V."""
    out = hidden.new_empty(hidden.shape[0], vocabulary)
    step = max(1, _HEAD_NUMBERS // hidden.shape[1])
    for at in range(0, vocabulary, step):
        part = plain(take_rows(head, slice(at, min(at + step, vocabulary))))
        out[:, at : at + step] = nn.functional.linear(hidden, part.to(hidden.device, hidden.dtype))
    return out


def _told(weights: Weights, tracker: Tracker) -> Iterator[tuple[str, Tensor | Packed]]:
    for name, value in weights:
        yield name, value
        tracker.advance(1)

"""Proof that two models are the same: weights, logits, greedy continuations, tokenizers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from puna.devices import DTYPES, choose_device, free_memory
from puna.errors import ModelError
from puna.formats.packed import plain
from puna.formats.proof.agreement import Agreement, agreement
from puna.formats.proof.divergence import Divergence, diverge
from puna.formats.proof.layerwise import States, Tokens, build, logits, states, streamed_states
from puna.formats.proof.rounding import STEPS, coarsest, distances
from puna.formats.proof.sketches import EMBEDDINGS, Sketches
from puna.formats.proof.tokens import ProofTokens, proof_tokens
from puna.formats.proof.verdict import Comparison, config_differences
from puna.formats.provenance import PayloadHash
from puna.formats.source import Source
from puna.model.attention import first_keys, fused
from puna.model.config import ModelConfig
from puna.model.counts import parameters
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, shapes
from puna.progress import Track, Tracker, silent
from puna.settings import Settings
from puna.tokenizer.tokenizer import Tokenizer

__all__ = ["Comparison", "VerifySettings", "compare"]

_OPERATIONS = 3e12  # of one model: half a minute to a minute on two cores
_LOGITS = 1 << 25  # of one model, where their number follows from that
_TOKENS = (256, 2048)  # at least, and at most, where their number follows from that
_PROJECTIONS = (8, 16)  # of each row; more where four bits leave much room for chance
_PADDING = 1024  # vocabularies are padded to multiples of powers of two up to this
_WAITING = 12  # tensors yet to be hashed: a layer's, so that hashing fills the time of computing


class VerifySettings(Settings):
    """How two models are compared.

    Attributes:
        low_memory: read one layer at a time. None: where both models in float32 would not fit into half of
            the free memory.
        device: what computes; the CPU, unless both models are to be compared on a GPU.
        dtype: the type of computation, whatever the weights are stored in.
        tokens: how many each model runs; None: 256 to 2,048, by the model's size.
        greedy_tokens: length of each greedy continuation; none are made with `low_memory`, where each token
            would read the model once.
    """

    low_memory: bool | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    tokens: int | None = Field(default=None, ge=16, le=65536)
    greedy_tokens: int = Field(default=64, ge=0, le=1024)


def compare(
    a: Source,
    b: Source,
    settings: VerifySettings = VerifySettings(),
    track: Track = silent,
    *,
    tokenizer_a: Tokenizer | Literal["own"] | None = "own",
    tokenizer_b: Tokenizer | Literal["own"] | None = "own",
) -> Comparison:
    """Run the same tokens through both models and hold the results against each other.

    Each model is read once and held alone, in memory or a layer of it. A tokenizer may be given in the place
    of a model's own, None to leave it out.

    Raises:
        ModelError: the vocabularies are not comparable, or a model is damaged.
        TokenizerError: a tokenizer cannot be opened.
        SettingsError: there is no such device.
    """
    tokenizers = tuple(
        source.tokenizer() if given == "own" else given
        for source, given in ((a, tokenizer_a), (b, tokenizer_b))
    )
    reading = _reading(a, b, settings, *tokenizers)
    with track("Comparing", sum(len(shapes(source.config)) for source in (a, b)), "tensors") as bar:
        first = reading.read(a, _rounded_to(b, a), bar)
        second = reading.read(b, _rounded_to(a, b), bar, first)
        figures = reading.figures(first, second)
    matter, harmless = config_differences(a.config, b.config)
    both = _agreement(*tokenizers)
    return Comparison(
        stored_a=dict(first.hashes.stored),
        stored_b=dict(second.hashes.stored),
        sha256_a=first.hashes.hexdigest(),
        sha256_b=second.hashes.hexdigest(),
        config=matter,
        told=(*harmless, *_told(a, b, tokenizers, both, reading)),
        distances=distances(first.sketches, second.sketches),
        divergence=figures,
        parted=reading.parted(first, second) if reading.greedy else None,
        greedy_tokens=reading.greedy,
        tokenizers=both,
        same_ends=_end_alike(a, b, *tokenizers),
        run={
            **reading.summary(),
            "equal_config": not matter and not any(_is_in_arithmetic(line) for line in harmless),
        },
    )


def _reading(a: Source, b: Source, settings: VerifySettings, *tokenizers: Tokenizer | None) -> _Reading:
    """What both models are to run, and how."""
    vocabulary = _common_vocabulary(a.config, b.config, *tokenizers)
    device = choose_device(settings.device)
    low_memory = not _both_fit(a, b) if settings.low_memory is None else settings.low_memory
    context = min(source.config.max_position_embeddings for source in (a, b))
    total = settings.tokens or min(_affordable(source.config) for source in (a, b))
    windows = [w for source in (a, b) if (w := source.config.sliding_window) is not None]
    tokenizer = next((each for each in tokenizers if each is not None), None)
    proof = proof_tokens(tokenizer, vocabulary, context, total, device, min(windows, default=None))
    greedy = 0 if low_memory else min(settings.greedy_tokens, max(0, context - proof.prompts.shape[1]))
    is_wide = any(_has_wide_matrices(source) for source in (a, b))
    projections = _PROJECTIONS[any(kind not in DTYPES for source in (a, b) for kind in source.stored)]
    return _Reading(
        DTYPES[settings.dtype], device, low_memory, is_wide, projections, vocabulary, proof, greedy
    )


def _rounded_to(other: Source, source: Source) -> frozenset[str]:
    """The types of a model that the other's low-bit schemes may have been made from."""
    packed = [kind for kind in other.stored if kind not in DTYPES]
    if not any(kind in STEPS for kind in (*packed, *source.stored)):  # scales tell more than magnitudes
        return frozenset()
    return frozenset(kind for kind in source.stored if packed and coarsest((kind, *packed)) in packed)


def _has_wide_matrices(source: Source) -> bool:
    """Whether more is stored in float32 or float64 than vectors, which are compared number by number."""
    vectors = sum(len(shape) == 1 for shape in shapes(source.config).values())
    return sum(source.stored.get(kind, 0) for kind in ("float32", "float64")) > vectors


@dataclass(frozen=True)
class _Read:
    """What one pass over a model gave; `continued` are the greedy continuations that it ran."""

    states: States
    hashes: PayloadHash
    sketches: Sketches
    continued: Tensor | None

    def flat(self, proof: ProofTokens) -> tuple[Tensor, Tensor | Packed]:
        """Hidden states of all sequences (R, D), and the output projection."""
        hidden = self.states.hidden[: len(proof.sequences)]
        return torch.cat([each.flatten(0, 1) for each in hidden]), self.states.head


@dataclass(frozen=True)
class _Reading:
    """How each of the two models is read and run; `is_wide`: rows are compared in float64."""

    dtype: torch.dtype
    device: torch.device
    low_memory: bool
    is_wide: bool
    projections: int
    vocabulary: int
    proof: ProofTokens
    greedy: int

    def read(
        self, source: Source, by_block: frozenset[str], bar: Tracker, first: _Read | None = None
    ) -> _Read:
        """Hash a model's tensors and run its tokens; the second model also runs what the first wrote."""
        hashes = PayloadHash()
        sketches = Sketches(self.vocabulary, self.is_wide, by_block, self.projections)
        weights = Weights(source.config, _Observed(source.weights, hashes, sketches))
        tokens = list(self.proof.sequences)
        if self.low_memory:
            found = streamed_states(weights, tokens, self.dtype, self.device, bar)
            return _Read(found, hashes, sketches, None)
        model = build(weights, self.dtype, self.device, bar)
        continued = None
        if self.greedy:
            continued = self._continued(model) if first is None else first.continued
            assert continued is not None
            tokens.append(Tokens(continued, torch.arange(continued.shape[1], device=self.device)[None]))
        return _Read(states(model, tokens), hashes, sketches, continued)

    def figures(self, first: _Read, second: _Read) -> Divergence:
        """How far the logits of all sequences are apart."""
        proof = self.proof
        rows = first.flat(proof), second.flat(proof)
        return diverge(*rows, self.vocabulary, proof.targets(), proof.numbers())

    def summary(self) -> dict[str, Any]:
        """For the record."""
        return {
            "low_memory": self.low_memory,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens": self.proof.count,
            "sequences": sum(len(each.ids) for each in self.proof.sequences),
            "furthest": self.proof.furthest,
            "is_text": self.proof.is_text,
            "vocabulary": self.vocabulary,
        }

    def parted(self, first: _Read, second: _Read) -> tuple[int | None, ...]:
        """After how many tokens each continuation parts.

        Both models have run the first one's continuations. Up to where they part, these are the second one's
        too; and both choices come from the same computation, which that of the cache is not.
        """
        at = self.proof.prompts.shape[1] - 1
        choices = []
        for read in (first, second):
            hidden = read.states.hidden[-1][:, at:-1]  # (P, greedy, D)
            chosen = logits(hidden.flatten(0, 1), read.states.head, self.vocabulary).argmax(-1)
            choices.append(chosen.view(hidden.shape[:2]))
        differ = (choices[0] != choices[1]).cpu()  # (P, greedy)
        return tuple(int(row.int().argmax()) if row.any() else None for row in differ)

    @torch.no_grad()
    def _continued(self, model: Llama) -> Tensor:
        """The prompts (P, T) and the model's greedy continuations: (P, T + greedy)."""
        ids = self.proof.prompts
        end = ids.shape[1] + self.greedy
        cache = _Held(torch.full((len(ids), 1), end, device=self.device), model.config.sliding_window)
        fed, at = ids, 0
        for _ in range(self.greedy):
            positions = torch.arange(at, ids.shape[1], device=self.device).expand(len(ids), -1)
            hidden = model.model(fed, positions, cache=cache)[:, -1]  # (P, D)
            fed = logits(hidden, model.lm_head.weight, self.vocabulary).argmax(-1, keepdim=True)
            at, ids = ids.shape[1], torch.cat((ids, fed), dim=1)
        return ids


@dataclass
class _Held:
    """A cache for prompts that come whole and tokens that come singly, all rows equally long."""

    rope_lengths: Tensor | None
    window: int | None
    held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Of q (B, T, N, H) to all keys so far; (B, T, N, H)."""
        if layer not in self.held:
            self.held[layer] = k, v
            starts = first_keys(q.shape[1], self.window, None, q.device)
            return fused(q, k, v, starts=starts, causal=True, dropout=0.0)
        k, v = (torch.cat(pair, dim=1) for pair in zip(self.held[layer], (k, v), strict=True))
        if self.window is not None:
            k, v = k[:, -self.window :], v[:, -self.window :]
        self.held[layer] = k, v
        return fused(q, k, v, starts=None, causal=False, dropout=0.0)


@dataclass(frozen=True)
class _Observed:
    """A model's tensors, sketched, and hashed in a thread of its own while they are computed with.

    Those of layers are expanded here, once for both who need it.
    """

    weights: Weights
    hashes: PayloadHash
    sketches: Sketches

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for name, value in self.weights:
                waiting.append(pool.submit(self.hashes.add, name, value))
                if len(waiting) > _WAITING:
                    waiting.popleft().result()
                numbers = value if name in EMBEDDINGS else plain(value)
                self.sketches.add(name, value, numbers)
                yield name, numbers
            for job in waiting:
                job.result()


def _common_vocabulary(a: ModelConfig, b: ModelConfig, *tokenizers: Tokenizer | None) -> int:
    """How many words both have; more are padding.

    Raises:
        ModelError: the vocabularies are not the same.
    """
    small, large = sorted((a.vocab_size, b.vocab_size))
    words = {tokenizer.vocab_size for tokenizer in tokenizers if tokenizer is not None}
    if small == large or (words and max(words) <= small):
        return small
    multiples = [2**power for power in range(3, 11) if 2**power <= _PADDING]
    if 2 * large <= 3 * small and any(-(-small // size) * size == large for size in multiples):
        return small
    raise ModelError(
        f"models of {a.vocab_size} and {b.vocab_size} words cannot be compared: ids of one mean nothing "
        "to the other; choose two models of one vocabulary"
    )


def _both_fit(a: Source, b: Source) -> bool:
    """Whether both in float32 take at most half of the free memory."""
    needed = 4 * sum(parameters(source.config).total for source in (a, b))
    return needed <= free_memory(torch.device("cpu")) / 2


def _affordable(config: ModelConfig) -> int:
    """Tokens to run: products take the time of large models, logits that of large vocabularies."""
    least, most = _TOKENS
    products = _OPERATIONS / (2 * parameters(config).total)
    return int(max(least, min(most, products, _LOGITS / config.vocab_size)))


def _agreement(a: Tokenizer | None, b: Tokenizer | None) -> Agreement | None:
    return None if a is None or b is None else agreement(a, b)


def _end_alike(a: Source, b: Source, *tokenizers: Tokenizer | None) -> bool:
    """Whether both end answers at the same tokens; one that does not say is not at odds with the other."""
    ends = [
        {*source.end_ids, *(() if tokenizer is None else tokenizer.end_ids)}
        for source, tokenizer in zip((a, b), tokenizers, strict=True)
    ]
    return ends[0] == ends[1] or not all(ends)


def _is_in_arithmetic(line: str) -> bool:
    """Whether a harmless difference of the config may still round differently."""
    return line.startswith(("rope_", "rms_norm_eps"))


def _told(
    a: Source,
    b: Source,
    tokenizers: Sequence[Tokenizer | None],
    both: Agreement | None,
    reading: _Reading,
) -> Iterator[str]:
    """What differs without making the models different, and what was not compared."""
    if a.end_ids != b.end_ids:
        yield f"end tokens: {list(a.end_ids)} and {list(b.end_ids)}"
    yield from () if both is None else both.notes
    if (tokenizers[0] is None) != (tokenizers[1] is None):
        yield f"only the {'first' if tokenizers[1] is None else 'second'} has a tokenizer"
    if not reading.proof.is_text:
        yield "neither has a tokenizer: random ids were run"
    if reading.proof.strided:
        yield f"positions of the longest sequence have gaps, to reach position {reading.proof.furthest:,}"
    if (window := reading.proof.unreached) is not None:
        yield f"the sliding window of {window:,} was not reached: run more than {window:,} tokens to pass it"
    if reading.low_memory:
        yield "one layer was held at a time: no greedy continuations were made"

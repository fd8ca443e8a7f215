"""What a comparison of two models found, and whether that makes them the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from puna.formats.proof.agreement import Agreement
from puna.formats.proof.divergence import Divergence
from puna.formats.proof.rounding import LIMITS, Distances, Furthest, Limit, coarsest
from puna.model.config import ModelConfig
from puna.settings import differences

_ROUNDING = 1e-6  # by which a config's number may differ, relatively: some formats keep it in float32
_ROPE = ("rope_theta", "rope_scaling")
_TOLD = (  # these change no logit; of padding and biases that are there or not, the logits tell
    "max_position_embeddings",
    "initializer_range",
    "residual_dropout",
    "attention_dropout",
    "tie_word_embeddings",
    "vocab_size",
    "attention_bias",
    "mlp_bias",
)


@dataclass(frozen=True)
class Comparison:
    """What was measured of two models.

    Attributes:
        stored_a, stored_b: how many tensors are stored in each type.
        sha256_a, sha256_b: hashes of the tensors as they are stored.
        config: fields of the config that differ and change logits, in words.
        told: what else differs or could not be compared, a sentence each.
        distances: how far every row of every tensor is from the other's.
        divergence: the figures of the logits.
        parted: of each greedy continuation the tokens after which the two part, None where they do not; the
            whole is None where none was made.
        greedy_tokens: how many tokens each continuation has.
        tokenizers: None where not both have one.
        same_ends: whether the same tokens end an answer, as far as both say.
        run: how it was measured, for the record.
    """

    stored_a: Mapping[str, int]
    stored_b: Mapping[str, int]
    sha256_a: str
    sha256_b: str
    config: tuple[str, ...]
    told: tuple[str, ...]
    distances: Distances
    divergence: Divergence
    parted: tuple[int | None, ...] | None
    greedy_tokens: int
    tokenizers: Agreement | None
    same_ends: bool
    run: Mapping[str, Any]

    @property
    def rounding(self) -> str:
        """The type whose rounding may explain a difference.

        Where all numbers compared are equal, as after a conversion from bfloat16 to float32, that is the type
        of computation, however coarse the numbers are.
        """
        if self.has_equal_numbers:
            return "float32"
        return self.distances.kind or coarsest((*self.stored_a, *self.stored_b))

    @property
    def furthest(self) -> Furthest | None:
        """The tensor, or row, that differs most for its type; None where no shapes are equal."""
        return self.distances.furthest

    @property
    def has_equal_numbers(self) -> bool:
        """Whether no number of any tensor differs, in whatever types they are stored."""
        return self.sha256_a == self.sha256_b or self.distances.alike == self.distances.tensors > 0

    @property
    def limit(self) -> Limit:
        """The largest differences that pass: none where every bit is equal."""
        return Limit(0.0, 0.0) if self.has_equal_bits else LIMITS[self.rounding]

    @property
    def has_equal_bits(self) -> bool:
        """Whether weights and config leave no room for rounding."""
        return self.sha256_a == self.sha256_b and bool(self.run["equal_config"])

    @property
    def first_parting(self) -> int | None:
        """Tokens after which the first greedy continuation parts; None where all agree."""
        found = [place for place in self.parted or () if place is not None]
        return min(found, default=None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why they are not the same; empty where they are."""
        return (*self.config, *self._beyond_limits(), *self._between_tokenizers())

    @property
    def equal(self) -> bool:
        """Whether nothing differs but what the stored types explain."""
        return not self.reasons

    @property
    def verdict(self) -> str:
        """In one line."""
        if not self.equal:
            return f"different: {'; '.join(self.reasons)}"
        return self._sameness() + ("" if self.same_ends else "; they end answers at different tokens")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "equal": self.equal,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "told": list(self.told),
            "config": list(self.config),
            "weights": {
                "equal": self.sha256_a == self.sha256_b,
                "sha256": [self.sha256_a, self.sha256_b],
                "stored": [dict(self.stored_a), dict(self.stored_b)],
            },
            "logits": self.divergence.as_dict(),
            "tensors": self.distances.as_dict(),
            "limits": asdict(self.limit),
            "greedy": self._greedy(),
            "tokenizer": None if self.tokenizers is None else self.tokenizers.as_dict(),
            "run": dict(self.run),
        }

    def lines(self) -> list[str]:
        """For people, the verdict last."""
        kinds = [", ".join(f"{n} {kind}" for kind, n in s.items()) for s in (self.stored_a, self.stored_b)]
        rows = [
            ("weights", f"{self._weights_words()}: {kinds[0]}; {kinds[1]}"),
            *self._tensor_rows(),
            *self._logit_rows(),
            *self._text_rows(),
            ("tokenizer", self._tokenizer_words()),
            *(("note", text) for text in self.told),
            ("verdict", self.verdict),
        ]
        return [f"{label:13} {text}" for label, text in rows]

    def _sameness(self) -> str:
        """The verdict on models that are the same."""
        if self.has_equal_bits:
            return "the same: weights and logits are equal bit for bit"
        found = self.divergence
        error = (
            f"the logits' relative error is {found.relative_error:.1e}, their KL divergence "
            f"{found.kl_mean:.1e} nats per token"
        )
        if not self.has_equal_numbers:
            return f"as close as {self.rounding} allows: {error}"
        end = "all logits are equal" if found.max_difference == 0 else error
        return f"the same: {self._weights_words()}; {end}"

    def _weights_words(self) -> str:
        if self.sha256_a == self.sha256_b:
            return "equal bit for bit"
        if not self.has_equal_numbers:
            return f"{self.distances.alike} of {self.distances.tensors} tensors equal, the others rounded"
        wider, narrower = self.distances.wider, self.distances.narrower
        parts = [(wider, "wider"), (narrower, "narrower")]
        told = [f"{n} tensor{'s are' if n > 1 else ' is'} stored in a {word} type" for n, word in parts if n]
        return "; ".join(["every number is equal", *told])

    def _tensor_rows(self) -> list[tuple[str, str]]:
        found = self.furthest
        if found is None or self.has_equal_numbers:
            return []
        words = (
            f"{found.where}, by {found.error:.1e} of its size where {found.allows} allows {found.limit:.1e}"
        )
        return [("furthest", words)]

    def _logit_rows(self) -> list[tuple[str, str]]:
        found = self.divergence
        worst = f"{found.worst_relative_error:.2e} in the sequence where it is largest"
        error = f"relative error {found.relative_error:.2e} over all tokens, {worst}"
        apart = f"largest difference {found.max_difference:.2e}, mean {found.mean_difference:.2e}"
        kl = f"mean {found.kl_mean:.2e}, 99.9% below {found.kl_p999:.2e}, largest {found.kl_max:.2e}"
        share, places = 100 * found.top1_agreement, f"{found.positions:,} tokens"
        choice = f"the same next word is likeliest after {share:.2f}% of {places}"
        return [
            ("logits", f"{error}; {apart}"),
            ("KL", f"{kl} nats per token"),
            ("first choice", f"{choice}; the last is at position {self.run['furthest']:,}"),
        ]

    def _text_rows(self) -> list[tuple[str, str]]:
        found, rows = self.divergence, []
        if found.loss_a is not None and found.loss_b is not None:
            rows.append(("text", f"cross-entropy {found.loss_a:.5f} and {found.loss_b:.5f} nats per token"))
        if self.parted is not None:
            place = self.first_parting
            words = "all equal" if place is None else f"the first parts after {place}"
            rows.append(("greedy", f"{len(self.parted)} × {self.greedy_tokens} tokens, {words}"))
        return rows

    def _tokenizer_words(self) -> str:
        if self.tokenizers is None:
            return "not compared"
        found = self.tokenizers
        tokens, strings = (
            f"{found.tokens_equal:,} of {found.tokens:,}",
            f"{found.equal:,} of {found.strings:,}",
        )
        return f"{tokens} tokens and {strings} strings alike; chat template: {found.template}"

    def _greedy(self) -> dict[str, Any] | None:
        if self.parted is None:
            return None
        return {"tokens": self.greedy_tokens, "parted": list(self.parted), "first": self.first_parting}

    def _beyond_limits(self) -> tuple[str, ...]:
        limit, found, far, reasons = self.limit, self.divergence, self.furthest, []
        why = "equal weights allow" if self.has_equal_bits else f"{self.rounding} allows"
        if far is not None and far.exceeds:
            most = f"{far.allows} allows {far.limit:.1e}"
            reasons.append(f"{far.where} differs by {far.error:.1e} of its size, where {most}")
        if found.relative_error > limit.logits:
            error = f"{found.relative_error:.1e}"
            reasons.append(f"the logits' relative error is {error}, where {why} {limit.logits:g}")
        if found.kl_mean > limit.kl:
            reasons.append(
                f"the KL divergence is {found.kl_mean:.1e} nats per token, where {why} {limit.kl:g}"
            )
        return tuple(reasons)

    def _between_tokenizers(self) -> tuple[str, ...]:
        found = self.tokenizers
        if found is None or found.holds:
            return ()
        words = []
        if found.tokenizers_differ:
            words.append(f"the tokenizers: {found.first}")
        if found.template_differs:
            words.append(f"the chat templates: {found.rendered or found.template}")
        return tuple(words)


def config_differences(a: ModelConfig, b: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fields that differ and change logits, and those that differ and do not, in words."""
    matter: list[str] = []
    told: list[str] = []
    same_turning = _turns_alike(a, b)
    for change in differences(a, b):
        name = change.key.partition(".")[0]
        by_length = a.rope_scaling.by_length or b.rope_scaling.by_length
        if name in _ROPE or (name == "max_position_embeddings" and by_length):
            harmless = same_turning
        else:
            harmless = name in _TOLD or _is_rounding(change.old, change.new)
        (told if harmless else matter).append(str(change))
    return tuple(matter), tuple(told)


def _is_rounding(old: Any, new: Any) -> bool:
    return isinstance(old, float) and isinstance(new, float) and math.isclose(old, new, rel_tol=_ROUNDING)


def _turns_alike(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether queries and keys turn by the same angles at every length, however the config spells it."""
    if a.head_dim != b.head_dim:
        return False
    longest = max(a.max_position_embeddings, b.max_position_embeddings)
    lengths = torch.tensor([[1], [longest], [4 * longest]])
    (first, size), (second, other) = (
        c.rope_scaling.frequencies(
            c.rope_theta, c.head_dim, c.max_position_embeddings, lengths, torch.float64
        )
        for c in (a, b)
    )
    close = bool(((first - second).abs() <= _ROUNDING * first.abs()).all())
    return close and math.isclose(size, other, rel_tol=_ROUNDING)

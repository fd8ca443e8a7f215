"""The rules that shape a distribution before a token is drawn, in their one order.

Three kinds. An `Edit` changes logits of single ids, or forbids them. A `Narrowing` raises a floor under the
scaled logits, given the largest of them in order: what lies below is not drawn. Temperature and typical_p act
on whole rows. Every rule treats a row by itself: its numbers are the same alone and in any company.

R rows that a rule acts on   V vocabulary   H the likeliest tokens of a row, in order
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.engine.state import SamplingState

COLDEST, HOTTEST = 1e-30, 1e30  # temperatures beyond give the same distributions, and float32 has no more


def constraint(logits: Tensor, rows: Tensor, states: Items[SamplingState]) -> None:
    """Forbid what an answer's constraint does not allow."""
    allowed = [state.constraint.allowed() for state in states if state.constraint is not None]
    mask = torch.stack(allowed).to(logits.device, logits.dtype)  # (R, V): 1 or 0
    # 1 - 1/1 = 0 and 1 - 1/0 = -inf: sums are an order faster than filling by a mask of bytes.
    logits.index_add_(0, rows, mask.reciprocal_().neg_().add_(1))


def minimum_length(logits: Tensor, rows: Tensor, states: Items[SamplingState]) -> None:
    """Forbid what would end an answer, except where its constraint leaves nothing else."""
    V = logits.shape[-1]
    for row, state in zip(rows.tolist(), states, strict=True):
        ends = torch.tensor([token for token in state.ends if token < V], device=logits.device).long()
        before = logits[row, ends]
        logits[row, ends] = -torch.inf
        if state.constraint is not None and logits[row].amax() == -torch.inf:
            logits[row, ends] = before


def logit_bias(logits: Tensor, rows: Tensor, states: Items[SamplingState]) -> None:
    """Add a request's own numbers to logits."""
    at, _ = _places(logits, rows, [state.bias[0] for state in states])
    logits[at] += _joined([state.bias[1] for state in states]).to(logits)


def repetition_penalty(logits: Tensor, rows: Tensor, states: Items[SamplingState]) -> None:
    """Divide positive logits of seen tokens by the penalty, multiply negative ones (arXiv 1909.05858)."""
    at, lengths = _places(logits, rows, [state.seen for state in states])
    by = _spread([state.params.repetition_penalty for state in states], lengths).to(logits)
    held = logits[at]
    logits[at] = torch.where(held > 0, held / by, held * by)


def presence_penalty(logits: Tensor, rows: Tensor, states: Items[SamplingState]) -> None:
    """Take the penalty from every token that the answer holds: OpenAI's definition."""
    at, lengths = _places(logits, rows, [state.answered for state in states])
    logits[at] -= _spread([state.params.presence_penalty for state in states], lengths).to(logits)


def frequency_penalty(logits: Tensor, rows: Tensor, states: Items[SamplingState]) -> None:
    """Take the penalty from a token as often as the answer holds it: OpenAI's definition."""
    at, lengths = _places(logits, rows, [state.answered for state in states])
    penalty = _spread([state.params.frequency_penalty for state in states], lengths)
    logits[at] -= (penalty * _joined([state.counts for state in states])).to(logits)


def temperature(logits: Tensor, setting: Tensor, largest: Tensor) -> Tensor:
    """Divide (R, V) by the temperature (R,), the largest logit (R,) moved to 0 first: no infinity arises."""
    scale = setting.clamp(COLDEST, HOTTEST).to(logits)
    return (logits - largest[:, None]).div_(scale[:, None])  # (R, V)


def top_k(scaled: Tensor, weights: Tensor, floor: Tensor, k: Tensor) -> Tensor:
    """Keep the k largest, and those equal to the last of them; 0 keeps all."""
    last = scaled.gather(1, k.long().clamp(1, scaled.shape[-1])[:, None] - 1)[:, 0]  # (R,)
    return torch.where(k > 0, torch.maximum(floor, last), floor)


def top_p(scaled: Tensor, weights: Tensor, floor: Tensor, p: Tensor) -> Tensor:
    """Keep the likeliest tokens, as few as together reach probability p, and those equal to the last of them.

    arXiv 1904.09751; 1 keeps all. The probability is of what rules before have left.
    """
    kept = scaled >= floor[:, None]  # (R, H)
    left = weights * kept
    reached = left.cumsum(dim=-1)
    total = torch.where(
        floor > -torch.inf, reached[:, -1], 1.0
    )  # where nothing was dropped H may be short of it
    needed = kept & (reached - left < (p * total)[:, None])
    last = scaled.gather(1, needed.sum(dim=-1).clamp(min=1)[:, None] - 1)[:, 0]  # (R,)
    return torch.where(p < 1, torch.maximum(floor, last), floor)


def min_p(scaled: Tensor, weights: Tensor, floor: Tensor, share: Tensor) -> Tensor:
    """Keep tokens of at least this share of the largest probability (arXiv 2407.01082); 0 keeps all."""
    return torch.maximum(floor, share.log().to(floor))  # the largest scaled logit is 0


def typical_p(scaled: Tensor, weights: Tensor, p: Tensor) -> Tensor:
    """Keep tokens whose surprise is nearest to the expected, as few as reach p together (arXiv 2202.00666).

    Those as near as the last of them stay too; 1 keeps all. Weights (R, V) in float64, 0 where rules before
    dropped a token; p (R,). A surprise is a scaled logit's negative and a constant: so it is measured.
    """
    probabilities = weights / weights.cumsum(dim=-1)[:, -1:]  # a running sum is the same in any company
    left = probabilities > 0
    expected = (probabilities * scaled.double()).where(left, 0.0).cumsum(dim=-1)[:, -1:]  # (R, 1)
    distance = (scaled.double() - expected).abs().where(left, torch.inf)  # (R, V)
    ordered, ids = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(1, ids).cumsum(dim=-1)
    short = (reached < p[:, None]).sum(dim=-1).clamp(max=weights.shape[-1] - 1)  # (R,)
    farthest = ordered.gather(1, short[:, None])  # (R, 1)
    return torch.where((distance > farthest) & (p[:, None] < 1), 0.0, weights)


@dataclass(frozen=True)
class Edit:
    """Changes logits (B, V) in place, in the given rows (R,), whose states (R) ask for it."""

    apply: Callable[[Tensor, Tensor, Items[SamplingState]], None]
    asked: Callable[[SamplingState], bool]


@dataclass(frozen=True)
class Scaling:
    """`apply(logits (R, V), setting (R,), largest (R,)) -> (R, V)`: the scaled logits, 0 the largest."""

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Narrowing:
    """`apply(scaled (R, H), weights (R, H), floor (R,), setting (R,)) -> (R,)`: the floor, raised.

    The H largest scaled logits in falling order, with their probabilities in float64. H must reach below the
    floor that comes out, or be all of the vocabulary; where `looks` is False any H will do. At `neutral`
    nothing changes.
    """

    apply: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    neutral: float
    looks: bool = True


@dataclass(frozen=True)
class Choosing:
    """`apply(scaled (R, V), weights (R, V), setting (R,)) -> (R, V)`: weights, those of dropped tokens 0."""

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    neutral: float


ORDER: dict[str, Edit | Scaling | Narrowing | Choosing] = {
    "constraint": Edit(constraint, lambda state: state.constraint is not None),
    "min_new_tokens": Edit(minimum_length, lambda state: state.length < state.params.min_new_tokens),
    "logit_bias": Edit(logit_bias, lambda state: len(state.bias[0]) > 0),
    "repetition_penalty": Edit(repetition_penalty, lambda state: len(state.seen) > 0),
    "presence_penalty": Edit(
        presence_penalty, lambda state: state.params.presence_penalty != 0 and len(state.answered) > 0
    ),
    "frequency_penalty": Edit(
        frequency_penalty, lambda state: state.params.frequency_penalty != 0 and len(state.answered) > 0
    ),
    "temperature": Scaling(temperature),
    "top_k": Narrowing(top_k, 0),
    "top_p": Narrowing(top_p, 1.0),
    "min_p": Narrowing(min_p, 0.0, looks=False),
    "typical_p": Choosing(typical_p, 1.0),
}
"""The rules in the order they are applied in: transformers' order. At temperature 0 those before it count."""

EDITS = {name: rule for name, rule in ORDER.items() if isinstance(rule, Edit)}
NARROWINGS = {name: rule for name, rule in ORDER.items() if isinstance(rule, Narrowing)}


def _places(logits: Tensor, rows: Tensor, ids: Items[array]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Index of every (row, id) in logits, and how many each row has."""
    lengths = torch.tensor([len(some) for some in ids])
    row = rows.repeat_interleave(lengths.to(rows.device))
    return (row, _joined(ids).to(logits.device)), lengths


def _joined(arrays: Items[array]) -> Tensor:
    whole = array(arrays[0].typecode)
    for part in arrays:
        whole.extend(part)
    return torch.frombuffer(whole, dtype=torch.int64 if whole.typecode == "q" else torch.float64)


def _spread(settings: Items[float], lengths: Tensor) -> Tensor:
    return torch.tensor(settings, dtype=torch.float64).repeat_interleave(lengths)

"""From logits to tokens: every request by its own rules; and the log-probabilities of tokens.

On a CPU a compiled kernel does it (`kernels/choosing.cpp`); what it does stands here, in `draw.py` and in
`rules.py` in plain torch, for other devices and where nothing can be compiled.

B batch   R rows of it   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from puna.engine.draw import drawn, in_blocks, largest_ids, rows_of
from puna.engine.params import SamplingParams, TokenLogprobs
from puna.engine.rules import EDITS, ORDER
from puna.engine.state import Choice, SamplingState
from puna.errors import ModelError
from puna.kernels.choosing import NOT_FINITE, Asked, Chooser, chooser_on

__all__ = [
    "ORDER", "Choice", "SamplingParams", "SamplingState", "TokenLogprobs", "choose", "logprobs",
]  # fmt: skip


MANY = 2**31  # tokens; no vocabulary has as many
DAMAGED = (
    "the model's logits are not finite: its weights are damaged, or too large for float16; "
    "load it with dtype='float32' or 'bfloat16'"
)
IMPOSSIBLE = (
    "no token is left to choose: the model holds all that constraint, min_new_tokens and logit_bias leave "
    "impossible; loosen those of them that are set"
)


def choose(logits: Tensor, states: Items[SamplingState]) -> list[Choice | ModelError]:
    """A token for every row of logits (B, V), by its state; a row's choice is the same in any company.

    States are not changed: `note` is for the caller. A row that allows no choice, since its logits are not
    finite or its rules leave nothing, gets an error, and the others their tokens.
    """
    chooser = chooser_on(logits.device)
    if chooser is not None and logits.numel():
        return _compiled(chooser, logits.detach(), states)
    return _plain(logits, states)


def _compiled(chooser: Chooser, logits: Tensor, states: Items[SamplingState]) -> list[Choice | ModelError]:
    """The choices by the compiled kernel; only rows that a rule for single ids asks for are copied."""
    if all(state.greedy for state in states):  # the shortest way: this is done between any two tokens
        likeliest = chooser.likeliest(logits)
        return [ModelError(DAMAGED) if token < 0 else Choice(token) for token in likeliest]
    rows = [row for row, state in enumerate(states) if _changes(state)]
    changed = None
    if rows:
        wide = torch.promote_types(logits.dtype, torch.float32)
        changed = rows_of(logits, rows).to(wide, copy=True, memory_format=torch.contiguous_format)
        _edit(changed, [states[row] for row in rows])
    places = {row: place for place, row in enumerate(rows)}
    found = chooser(logits, changed, places, [_asked(state) for state in states])
    choices: list[Choice | ModelError] = []
    for (token, fault, logprob, top), state in zip(found, states, strict=True):
        if fault:
            choices.append(ModelError(DAMAGED if fault == NOT_FINITE else IMPOSSIBLE))
        elif not state.scored:
            choices.append(Choice(token))
        else:
            told = None if state.params.logprobs is None else TokenLogprobs(token, logprob, top)
            choices.append(Choice(token, logprob, told))
    return choices


def _changes(state: SamplingState) -> bool:
    """Whether a rule for single ids is asked for: a plain loop, since it runs for every token."""
    for rule in EDITS.values():  # noqa: SIM110
        if rule.asked(state):
            return True
    return False


def _asked(state: SamplingState) -> Asked:
    params = state.params
    return Asked(
        state.uniform, params.temperature, params.top_p, params.min_p, params.typical_p,
        min(params.top_k, MANY), min(params.logprobs or 0, MANY) if state.scored else -1,
    )  # fmt: skip


def _plain(logits: Tensor, states: Items[SamplingState]) -> list[Choice | ModelError]:
    """The choices by plain torch."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    peaks = in_blocks(wide, -torch.inf).amax(dim=-1)  # (B, V / BLOCK)
    largest = peaks.amax(dim=-1).tolist()  # NaN where any logit is
    if not all(map(math.isfinite, largest)):
        return _around_faults(logits, states, largest, DAMAGED)
    edited = _edited(wide, states)
    if edited is not wide:
        peaks = in_blocks(edited, -torch.inf).amax(dim=-1)
        largest = peaks.amax(dim=-1).tolist()
        if not all(map(math.isfinite, largest)):
            return _around_faults(logits, states, largest, IMPOSSIBLE)
    return _with_logprobs(wide, _tokens(edited, peaks, states), states)


def logprobs(logits: Tensor, tokens: Items[int], top: Items[int]) -> list[TokenLogprobs]:
    """Log-probabilities of each row's token and its `top` likeliest, by the model's own logits (R, V).

    Of tokens equally likely the lower id comes first.
    """
    chooser = chooser_on(logits.device)
    if chooser is not None and logits.numel():
        asked = [Asked(token=token, top=min(count, MANY)) for token, count in zip(tokens, top, strict=True)]
        found = chooser(logits.detach(), None, {}, asked)
        if not any(row.fault for row in found):
            return [TokenLogprobs(row.token, row.logprob, row.top) for row in found]
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    values = wide.log_softmax(dim=-1)  # (R, V)
    chosen = values.gather(1, torch.tensor(tokens, device=values.device).long()[:, None])[:, 0].tolist()
    best = _likeliest(wide, values, top) if any(top) else [()] * len(tokens)
    return [
        TokenLogprobs(token, logprob, tops) for token, logprob, tops in zip(tokens, chosen, best, strict=True)
    ]


def _around_faults(
    logits: Tensor, states: Items[SamplingState], largest: list[float], fault: str
) -> list[Choice | ModelError]:
    """Choices of the rows whose largest logit is finite, and errors in the places of the others."""
    choices: list[Choice | ModelError] = [ModelError(fault) for _ in states]
    sound = [row for row, value in enumerate(largest) if math.isfinite(value)]
    found = _plain(rows_of(logits, sound), [states[row] for row in sound]) if sound else []
    for row, choice in zip(sound, found, strict=True):
        choices[row] = choice
    return choices


def _edited(logits: Tensor, states: Items[SamplingState]) -> Tensor:
    """Logits after the rules for single ids; the given ones where nobody asks for such a rule."""
    if not any(map(_changes, states)):
        return logits
    edited = logits.clone()  # the caller's stay the model's own
    _edit(edited, states)
    return edited


def _edit(logits: Tensor, states: Items[SamplingState]) -> None:
    """Apply the rules for single ids in place."""
    for rule in EDITS.values():
        rows = [row for row, state in enumerate(states) if rule.asked(state)]
        if rows:
            rule.apply(logits, torch.tensor(rows, device=logits.device), [states[row] for row in rows])


def _tokens(logits: Tensor, peaks: Tensor, states: Items[SamplingState]) -> list[int]:
    """One token for each row: the largest at temperature 0, a drawn one otherwise."""
    tokens = [0] * len(states)
    for greedy in (True, False):
        rows = [row for row, state in enumerate(states) if (state.params.temperature == 0) == greedy]
        if rows:
            parts = rows_of(logits, rows), rows_of(peaks, rows)
            found = largest_ids(*parts) if greedy else drawn(*parts, [states[row] for row in rows])
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return tokens


def _with_logprobs(
    logits: Tensor, tokens: list[int], states: Items[SamplingState]
) -> list[Choice | ModelError]:
    """The tokens, with log-probabilities where a state is to be told them."""
    choices: list[Choice | ModelError] = [Choice(token) for token in tokens]
    rows = [row for row, state in enumerate(states) if state.scored]
    if not rows:
        return choices
    top = [states[row].params.logprobs for row in rows]
    found = logprobs(rows_of(logits, rows), [tokens[row] for row in rows], [count or 0 for count in top])
    for row, one, count in zip(rows, found, top, strict=True):
        choices[row] = Choice(one.token, one.logprob, None if count is None else one)
    return choices


def _likeliest(logits: Tensor, values: Tensor, top: Items[int]) -> list[tuple[tuple[int, float], ...]]:
    """Each row's `top` likeliest ids with their values, in falling order; equal ones by id.

    By the logits, since rounding makes more values equal. A threshold is found first: which of equal
    numbers `topk` gives, and in which order, depends on how many are asked for.
    """
    V = logits.shape[-1]
    counts = torch.tensor([min(count, V) for count in top], device=logits.device)
    ordered = logits.topk(int(counts.max())).values  # (R, most)
    least = ordered.gather(1, counts.clamp(min=1)[:, None] - 1)  # (R, 1)
    row, ids = ((logits >= least) & (counts > 0)[:, None]).nonzero(as_tuple=True)
    found: list[list[tuple[float, int, float]]] = [[] for _ in top]
    for where, token, logit, value in zip(
        row.tolist(), ids.tolist(), logits[row, ids].tolist(), values[row, ids].tolist(), strict=True
    ):
        found[where].append((-logit, token, value))
    return [
        tuple((token, value) for _, token, value in sorted(some)[:count])
        for some, count in zip(found, top, strict=True)
    ]

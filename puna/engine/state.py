"""What sampling remembers of one answer: its tokens' counts, its random numbers, its score. No tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from puna.engine.params import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from puna.engine.constraints import Constraint


@dataclass(frozen=True)
class Choice:
    """A token; its log-probability where the state is `scored`; what `SamplingParams.logprobs` asks for."""

    token: int
    logprob: float | None = None
    logprobs: TokenLogprobs | None = None


class SamplingState:
    """One answer's side of sampling. Ids are of the model's vocabulary; end ids need not be.

    `index` says which of a request's answers it is. Its random numbers are a function of (seed, index) alone:
    the first answer of three is the same as an only one.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Items[int],
        end_ids: Items[int],
        index: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        self.params, self.constraint = params, constraint
        self.ends = tuple(dict.fromkeys((*params.stop_ids, *(() if params.ignore_eos else end_ids))))
        """What may not come before `min_new_tokens`."""
        self.scored = params.logprobs is not None or params.answers > params.n
        """Whether choices are to carry log-probabilities."""
        self.greedy = constraint is None and not self.scored and _is_greedy(params)
        """Whether each of its tokens is the likeliest by the model itself, and nothing more is asked."""
        self.length, self._sum = 0, 0.0
        self._random = Random() if params.seed is None else Random(f"{params.seed}/{index}")
        self.uniform = self._random.random()
        """In [0, 1): what the next token is drawn with."""
        self.bias = array("q", params.logit_bias), array("d", params.logit_bias.values())
        # Arrays, since tensors read them in place: a penalty costs no walk through the answer at each token.
        self.seen = array("q", dict.fromkeys(prompt) if params.repetition_penalty != 1 else ())
        """Ids that the prompt or the answer holds, each once."""
        self.answered, self.counts = array("q"), array("d")
        """Ids that the answer holds, each once, and how often."""
        self._seen, self._place = set(self.seen), dict[int, int]()

    @property
    def score(self) -> float:
        """Mean log-probability of the answer's tokens, by the model itself; 0 before the first."""
        return self._sum / max(self.length, 1)

    def note(self, choice: Choice) -> None:
        """The answer goes on with this choice; the next one gets a random number of its own."""
        token = choice.token
        self.length += 1
        self._sum += choice.logprob or 0.0
        self.uniform = self._random.random()
        if self.params.repetition_penalty != 1 and token not in self._seen:
            self._seen.add(token)
            self.seen.append(token)
        if self.params.presence_penalty or self.params.frequency_penalty:
            self._count(token)

    def _count(self, token: int) -> None:
        if token in self._place:
            self.counts[self._place[token]] += 1
            return
        self._place[token] = len(self.answered)
        self.answered.append(token)
        self.counts.append(1)


def _is_greedy(params: SamplingParams) -> bool:
    """Whether no rule for single ids is ever asked for, nor anything that is drawn."""
    changes = (
        params.min_new_tokens or params.logit_bias or params.presence_penalty or params.frequency_penalty
    )
    return params.temperature == 0 and not changes and params.repetition_penalty == 1

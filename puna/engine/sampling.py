"""From logits to a token: rules that shape a distribution, in one order, and one draw from what is left.

B batch   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from puna.errors import ModelError
from puna.settings import Settings

HEAD = 1024  # tokens; rarely does more than this hold the probability that top_p asks for


class SamplingParams(Settings):
    """How one request wants its tokens chosen, and when to stop.

    The defaults draw from the model's own distribution. `temperature` 0 always takes the likeliest token, the
    lowest id where several are; of the other rules only `repetition_penalty` then has a say, since it alone
    changes which token is likeliest.
    """

    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens, as few as together reach this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Above 1, tokens that have occurred in the prompt or the answer become rarer."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """The same seed gives the same answer, whatever else is in the batch; None differs every time."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; the answer is cut before the first of them. One may be given bare."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logprobs: int | None = Field(None, ge=0)
    """How many likely tokens to report beside each chosen one; 0: the chosen one alone, None: nothing."""

    @field_validator("stop", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(text, str) and text for text in values):
            raise ValueError(f"expected a text or a list of texts, none of them empty, got {value!r}")
        return tuple(values)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before any rule: of a token and the likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def repetition_penalty(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Divide positive logits of seen tokens by the penalty, multiply negative ones (arXiv 1909.05858)."""
    by = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / by, logits * by), logits)  # (B, V)


def temperature(logits: Tensor, setting: Tensor, seen: Tensor) -> Tensor:
    """Divide by the temperature, the largest logit moved to 0 first: a tiny one must not give infinity."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / setting[:, None]  # (B, V)


def top_k(logits: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Keep the k largest, and those equal to the last of them; 0 keeps all."""
    V = logits.shape[-1]
    wanted = torch.where(k > 0, k, V).clamp(max=V).long()  # (B,)
    ordered = logits.topk(int(wanted.max())).values  # (B, max k)
    last = ordered.gather(1, wanted[:, None] - 1)  # (B, 1)
    return logits.masked_fill(logits < last, -torch.inf)  # (B, V)


def top_p(logits: Tensor, p: Tensor, seen: Tensor) -> Tensor:
    """Keep the likeliest tokens, as few as together reach probability p, and those equal to the last of them.

    arXiv 1904.09751; 1 keeps all. The likeliest HEAD tokens are sorted, which mostly suffices; where they do
    not reach p, all are.
    """
    probabilities = logits.softmax(dim=-1)  # (B, V)
    least, reached = _nucleus_edge(probabilities, p, HEAD)  # (B,), (B,)
    for row in (~reached).nonzero()[:, 0].tolist():  # each alone, so that none depends on the others
        least[row] = _nucleus_edge(probabilities[row : row + 1], p[row : row + 1], logits.shape[-1])[0]
    dropped = (probabilities < least[:, None]) & (p[:, None] < 1)
    return logits.masked_fill(dropped, -torch.inf)  # (B, V)


def _nucleus_edge(probabilities: Tensor, p: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """The smallest probability kept, and whether the `head` likeliest tokens suffice to know: (B,) each."""
    ordered = probabilities.topk(min(head, probabilities.shape[-1])).values  # (B, head)
    likelier = ordered.cumsum(dim=-1) - ordered
    kept = (likelier < p[:, None]).sum(dim=-1)  # (B,)
    return ordered.gather(1, kept[:, None] - 1)[:, 0], (kept < head) | (p >= 1)


def min_p(logits: Tensor, share: Tensor, seen: Tensor) -> Tensor:
    """Keep tokens of at least this share of the largest probability (arXiv 2407.01082); 0 keeps all."""
    least = logits.amax(dim=-1, keepdim=True) + share[:, None].log()  # (B, 1)
    return logits.masked_fill(logits < least, -torch.inf)  # (B, V)


@dataclass(frozen=True)
class Rule:
    """A step from logits to the logits that are drawn from.

    `apply(logits (B, V), setting (B,), seen (B, V)) -> (B, V)`: the setting of each row, and which tokens it
    has held so far. At `neutral` a row does not change. Greedy rows skip what is not `for_greedy`.
    """

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    neutral: float
    for_greedy: bool = False


ORDER = {
    "repetition_penalty": Rule(repetition_penalty, 1.0, for_greedy=True),
    "temperature": Rule(temperature, 1.0),
    "top_k": Rule(top_k, 0),
    "top_p": Rule(top_p, 1.0),
    "min_p": Rule(min_p, 0.0),
}
"""The rules by their field of SamplingParams, in the order they are applied in (transformers' order)."""


class Sampler:
    """Chooses a token for every row of a batch; a row's choice does not depend on the other rows.

    Every row draws from a generator of its own: torch's global one is neither used nor changed.
    """

    def __init__(
        self, params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], V: int, device: torch.device
    ) -> None:
        self._params = list(params)
        self._generators = [_generator(row.seed) for row in params]
        self._seen = torch.zeros(len(params), V, dtype=torch.bool, device=device)  # (B, V)
        for row, prompt in enumerate(prompts):
            self._seen[row, torch.tensor(prompt, dtype=torch.long, device=device)] = True
        self._device = device
        self._prepare()

    def sample(self, logits: Tensor) -> list[int]:
        """A token for every row of logits (B, V), which are then remembered as seen.

        Raises:
            ModelError: logits are NaN or infinite.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not bool(torch.isfinite(wide.amax(dim=-1)).all()):  # the largest of a row is NaN where any is
            raise ModelError(
                "the model's logits are not finite: its weights are damaged, or too large for float16; "
                "load it with dtype='float32' or 'bfloat16'"
            )
        for name, setting in self._settings.items():
            wide = ORDER[name].apply(wide, setting, self._seen)  # (B, V)
        tokens: list[int] = wide.argmax(dim=-1).tolist()  # the lowest id where several are largest
        drawing = [row for row, params in enumerate(self._params) if params.temperature > 0]
        host = wide.cpu() if drawing else wide
        for row in drawing:
            tokens[row] = draw(host[row], self._generators[row])
        self._seen[self._rows, torch.tensor(tokens, device=self._device)] = True
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._params = [self._params[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        self._seen = self._seen[list(rows)]
        self._prepare()

    def _prepare(self) -> None:
        """Gather the rows' settings as tensors (B,), only of rules that some row uses."""
        self._rows = torch.arange(len(self._params), device=self._device)
        self._settings: dict[str, Tensor] = {}
        for name, rule in ORDER.items():
            values = [_setting(params, name, rule) for params in self._params]
            if any(value != rule.neutral for value in values):
                self._settings[name] = torch.tensor(values, device=self._device)


def draw(logits: Tensor, generator: torch.Generator) -> int:
    """A token from logits (V,), by one uniform number and the inverse of the cumulative distribution.

    In float64, and both arguments on the CPU: the same numbers give the same token whatever the model's
    device. A token of probability 0 is never drawn.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)  # (V,)
    total = cumulative[-1]
    uniform = torch.rand((), dtype=torch.float64, generator=generator)  # in [0, 1)
    token = torch.searchsorted(cumulative, uniform * total, right=True)
    # The product may round up to the total; the first token that reaches it is the last that can be drawn.
    return int(torch.minimum(token, torch.searchsorted(cumulative, total)))


def logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of each row's token and its `top` likeliest, by the model's own logits (B, V)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    values = logits.log_softmax(dim=-1, dtype=wide)  # (B, V)
    chosen = values.gather(1, torch.tensor(tokens, device=values.device)[:, None])[:, 0].tolist()
    best, ids = (x.tolist() for x in values.topk(min(max(top), values.shape[-1])))
    return [
        TokenLogprobs(token, chosen[row], tuple(zip(ids[row][:count], best[row][:count], strict=True)))
        for row, (token, count) in enumerate(zip(tokens, top, strict=True))
    ]


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _setting(params: SamplingParams, name: str, rule: Rule) -> float:
    skipped = params.temperature == 0 and not rule.for_greedy
    return rule.neutral if skipped else getattr(params, name)

"""One request on its way: plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Literal

from puna.engine.sampling import SamplingParams, TokenLogprobs
from puna.engine.text import AnswerText

FinishReason = Literal["stop", "length"]


class Sequence:
    """A prompt, the tokens that follow it, and why they ended."""

    def __init__(
        self,
        prompt: Items[int],
        params: SamplingParams,
        end_ids: Items[int],
        context: int,
        text: AnswerText | None,
    ) -> None:
        """`context` is the longest sequence; `text` is None for a model without tokenizer."""
        self.prompt, self.params = tuple(prompt), params
        self.limit = min(params.max_new_tokens, context - len(prompt))
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self._ends = frozenset() if params.ignore_eos else frozenset(end_ids)
        self._text = text

    @property
    def longest(self) -> int:
        """The length it may reach, prompt and answer together."""
        return len(self.prompt) + self.limit

    def push(self, token: int) -> str:
        """Take the next token; the text that is certain by it. Sets `finish_reason` where it is the last."""
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
            return "" if self._text is None else self._text.close()
        piece = "" if self._text is None else self._text.push(token)
        if self._text is not None and not self._text.stopped and len(self.tokens) == self.limit:
            piece += self._text.close()
        if self._text is not None and self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"
        return piece

"""One answer in the making: its prompt and tokens, where its keys and values are, why it ended."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from puna.engine.blocks import Content
    from puna.engine.params import SamplingParams, TokenLogprobs
    from puna.engine.text import AnswerText

FinishReason = Literal["stop", "length", "cancelled"]
Ids = TypeVar("Ids", tuple[int, ...], list[int])


class Sequence:
    """A prompt, the tokens that follow it, and the blocks that hold its keys and values.

    `prompt` is the prompt as used and `dropped` how many of its tokens were left out. `ids` is what the model
    sees: prompt and answer, less what sliding left behind; the first `computed` of them have keys and values.
    `tokens` is the answer, of `limit` tokens at most; `ids` gets no longer than `longest`.

    Where the prompt and the answer outgrow the context, `params.overflow` says what happens:

    - refuse: the prompt must be shorter than the context, and the answer ends where the context does;
    - truncate: the oldest prompt tokens go, so that `max_new_tokens` fit, or as many as half the context;
    - slide: a prompt longer than the context is cut like that; whenever `ids` outgrow the context, the newest
      half of it stays and is computed again, since its positions have changed.

    The first `anchor` tokens, such as BOS, always stay.
    """

    def __init__(
        self,
        prompt: Items[int],
        params: SamplingParams,
        end_ids: Items[int],
        context: int,
        text: AnswerText | None,
        *,
        anchor: int = 0,
        salt: int | None = None,
    ) -> None:
        """`context` is the longest `ids`; `text` is None for a model without tokenizer.

        `salt` stands for whatever else keys and values depend on, such as the rotary base: beginnings are
        shared only where it is equal.
        """
        slides = params.overflow == "slide"
        self.params, self.salt = params, salt
        # Half of the context and the anchor must leave room for a token, or sliding would never end.
        self._anchor, self._context = min(anchor, (context - 1) // 2), context
        self.prompt = self._fitting(tuple(prompt))
        self.dropped = len(prompt) - len(self.prompt)
        self.limit = params.max_new_tokens
        if not slides:
            self.limit = min(self.limit, context - len(self.prompt))
        self.longest = min(len(self.prompt) + self.limit, context)
        self.shares = params.prompt_logprobs is None  # a shared block comes without the logits of its rows
        self.ids = list(self.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]  # nothing comes before the first token
        self.finish_reason: FinishReason | None = None
        self._ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(end_ids))
        self._text = text
        self._place()

    def _place(self) -> None:
        """What the scheduler keeps here."""
        self.computed = 0
        self.blocks: list[int | None] = []
        """blocks[i] holds positions i · size … (i + 1) · size - 1; None: behind the window, given back."""
        self.behind = 0
        """How many of the blocks, the first ones, are behind the window."""
        self.content: Content | None = None
        """What its blocks that are full hold; None while it has none."""
        self.slid = False
        """Whether `ids` have changed, so that what is computed is no longer theirs."""
        self.rank = (0, 0)
        """Smaller goes first."""

    def push(self, token: int, complete: bool = False) -> str:
        """Take the next token; the text that is certain by it. Sets `finish_reason` where it is the last.

        `complete`: nothing may follow it, since it satisfies a constraint.
        """
        self.tokens.append(token)
        self.ids.append(token)
        if len(self.ids) > self._context:
            self.ids = self._newest(self.ids, self._anchor + self._context // 2)
            self.slid = True
        ended = token in self._ends
        last = ended or complete or len(self.tokens) == self.limit
        piece, stopped = self._show(token, ended, last)
        if ended or complete or stopped:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
        return piece

    def cancel(self) -> str:
        """End it here; the text that was held back. One that has ended stays as it is."""
        if self.finish_reason is not None:
            return ""
        self.finish_reason = "cancelled"
        return "" if self._text is None else self._text.close()

    def _show(self, token: int, ended: bool, last: bool) -> tuple[str, bool]:
        """The text that is certain by a token, and whether a stop string was found in it."""
        text = self._text
        if text is None:
            return "", False
        piece = "" if ended else text.push(token, stops=len(self.tokens) > self.params.min_new_tokens)
        if last:
            piece += text.close()
        return piece, text.stopped

    def _fitting(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        answer = min(self.params.max_new_tokens, self._context // 2)
        room = {"refuse": len(prompt), "truncate": self._context - answer, "slide": self._context}
        if len(prompt) <= room[self.params.overflow]:
            return prompt
        return self._newest(prompt, self._context - answer)

    def _newest(self, ids: Ids, length: int) -> Ids:
        """The anchor and the newest of ids, `length` in all."""
        return ids[: self._anchor] + ids[len(ids) - length + self._anchor :]

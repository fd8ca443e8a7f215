"""The text of one answer as its tokens come: cut at stop strings, and nothing shown that may yet be cut."""

from __future__ import annotations

from collections.abc import Sequence

from puna.tokenizer.stream import StreamingDecoder
from puna.tokenizer.tokenizer import Tokenizer


class AnswerText:
    """Tokens in, pieces of text out; the pieces together are the answer's text.

    What could be the beginning of a stop string is held back until it is clear that it is not.
    """

    def __init__(self, decoder: StreamingDecoder, vocab_size: int, stop: Sequence[str]) -> None:
        """Ids from `vocab_size` on have no text: models are often padded to a round number of them."""
        self._decoder, self._vocab_size, self._stop = decoder, vocab_size, tuple(stop)
        self._held = ""
        self._stops = True
        self.stopped = False

    def push(self, token: int, stops: bool = True) -> str:
        """The text that is certain by this token; sets `stopped` when a stop string is complete.

        Where it does not `stop`, its text counts towards no stop string, not even as a beginning: so are the
        first tokens of an answer that must have a number of them.
        """
        self._stops = stops
        return self._release(self._decoder.push(token)) if token < self._vocab_size else ""

    def close(self) -> str:
        """What is still held back, once no token follows; it stops if the last token's text did."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        if not self._stops:
            self._held = ""
            return text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def answer_text(
    tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], continues: bool
) -> AnswerText:
    """For the answer to a prompt.

    Where it `continues` the prompt, its text is what the decoding of both has beyond the decoding of the
    prompt: with its leading space, so that prompt + text reads as the whole. Otherwise it reads by itself.
    """
    decoder, size = tokenizer.stream(), tokenizer.vocab_size
    if continues:
        for token in prompt:
            if token < size:
                decoder.push(token)
    return AnswerText(decoder, size, stop)


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, the whole of it excepted."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

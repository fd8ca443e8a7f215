"""A conversation with a model: what was said, what the model still sees of it, its answers as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puna.engine.llm import LLM
from puna.engine.params import SamplingParams
from puna.engine.stream import Stream
from puna.errors import InputError, PunaError
from puna.recipes.answering.options import seed_of
from puna.recipes.answering.terminal import Write, interrupts
from puna.settings import parse
from puna.tokenizer import chat as chats

Messages = list[dict[str, str]]
Note = Callable[[str], None]


class Conversation:
    """A model, what was said, and how the next answer is made.

    Answers are written with `write`, remarks with `note`. `files` are where the conversation was saved to or
    loaded from: they may be written over.
    """

    def __init__(
        self, llm: LLM, sampling: dict[str, Any], template: str | None, write: Write, note: Note
    ) -> None:
        self.sampling, self.note = dict(sampling), note
        self.defaults = dict(sampling)
        """What the settings were at the start: /set without a value goes back to it."""
        self.messages: Messages = []
        self.files: set[Path] = set()
        self.ended = False
        self.failed = 0
        """How many answers an error kept from being made."""
        self._llm, self._template, self._write = llm, template, write
        self._answers = 0  # made so far: with a seed, each has random numbers of its own
        self._unseen = 0  # exchanges, the oldest, that the model no longer sees

    @property
    def system(self) -> Messages:
        """The system message alone; empty where there is none."""
        return [message for message in self.messages[:1] if message["role"] == "system"]

    @property
    def said(self) -> Messages:
        """All messages after the system's."""
        return self.messages[len(self.system) :]

    def begin(self, messages: Messages) -> None:
        """Go on from these messages; nothing changes where the template refuses them.

        Raises:
            InputError: the model has no tokenizer or no chat template, or the template refuses them.
        """
        waits = bool(messages) and messages[-1]["role"] == "user"
        self._length(messages if waits else [*messages, {"role": "user", "content": "Hello"}])
        self.messages, self._unseen = list(messages), 0

    def ask(self, text: str) -> None:
        """Answer what the user says; where nothing could be answered it counts as unsaid."""
        self.messages.append({"role": "user", "content": text})
        if not self._answer():
            del self.messages[-1]
            self.note("[your message counts as unsaid]")

    def retry(self) -> None:
        """Answer the last message of the user's once more.

        Raises:
            InputError: there is none.
        """
        if not self.said:
            raise InputError("nothing was said yet")
        before = [self.messages.pop()] if self.messages[-1]["role"] == "assistant" else []
        if not self._answer():
            self.messages += before

    def _answer(self) -> bool:
        """Whether there is an answer: a whole one, or the part that came before it was stopped."""
        pieces: list[str] = []
        try:
            whole = self._stream(pieces)
        except PunaError as error:
            self.note(f"[{error}]")
            self.failed += 1
            whole = False
        if whole or pieces:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return whole or bool(pieces)

    def _stream(self, pieces: list[str]) -> bool:
        """Write an answer as it comes, and then its figures; False where Ctrl-C stopped it."""
        messages, unseen = self._seen()
        began = first = time.perf_counter()
        with interrupts() as interrupt:
            stream = self._llm.stream_chat(messages, template=self._template, **self._seeded())
            interrupt.act = stream.stop
            if interrupt.asked:  # before there was a stream to be stopped
                stream.stop()
            self._forget(unseen)
            try:
                for piece in stream:
                    first = time.perf_counter() if not pieces else first
                    pieces.append(piece)
                    self._write(piece)
            finally:
                stream.close()
                if pieces:
                    self._write("\n")
        limit = self._params().max_new_tokens
        self.note(_figures(stream, limit, first - began, time.perf_counter() - first))
        return not interrupt.asked

    def _seeded(self) -> dict[str, Any]:
        self._answers += 1
        seed = self.sampling.get("seed")
        return self.sampling if seed is None else {**self.sampling, "seed": seed_of(seed, self._answers)}

    def _params(self) -> SamplingParams:
        return parse(SamplingParams, self.sampling, "sampling")

    def _seen(self) -> tuple[Messages, int]:
        """What fits of the conversation, with room to answer; and how many of the oldest exchanges do not.

        The system message and the last message are always there, fitting or not.
        """
        room = self._llm.context - min(self._params().max_new_tokens, self._llm.context // 2)
        begins = [number for number, message in enumerate(self.said) if message["role"] == "user"] or [0]
        for unseen in range(self._unseen, len(begins)):
            seen = [*self.system, *self.said[begins[unseen] if unseen else 0 :]]
            if self._length(seen) <= room:
                break
        return seen, unseen

    def _forget(self, unseen: int) -> None:
        if unseen > self._unseen:
            stays = "; the system message stays" if self.system else ""
            oldest = "first exchange" if unseen == 1 else f"first {unseen} exchanges"
            self.note(
                f"[the conversation outgrew the {self._llm.context} tokens that this model takes: from here "
                f"on it does not see the {oldest}{stays}]"
            )
        self._unseen = unseen

    def _length(self, messages: Messages) -> int:
        if self._llm.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, which a conversation needs; name one by --tokenizer"
            )
        return len(chats.render(self._llm.tokenizer, messages, self._template))


def _figures(stream: Stream, limit: int, wait: float, seconds: float) -> str:
    """How long an answer was, and how quick; the wait for its first token, which grows with the prompt."""
    if not stream.tokens:
        return "[stopped before the first token]"
    rate = f", {(stream.tokens - 1) / seconds:.1f} tokens/s" if stream.tokens > 1 and seconds > 0 else ""
    cut = "cut at max_new_tokens; " if stream.tokens == limit else "cut where the context is full; "
    ended = {"cancelled": "stopped; ", "length": cut}.get(stream.finish_reason or "", "")
    return f"[{ended}{stream.tokens} tokens{rate}, the first after {wait:.2f} s]"

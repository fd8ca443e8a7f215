"""Log-probabilities of tokens as OpenAI's API lists them: in conversations, and in completions of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from puna.engine.answer import Request
from puna.engine.params import TokenLogprobs
from puna.tokenizer.tokenizer import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which JSON cannot write; OpenAI's number for it


class TokenTexts:
    """What tokens are called."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Tokens without a text, as all are where there is no tokenizer, are called by their ids."""
        self.tokenizer = tokenizer
        self.known = 0 if tokenizer is None else tokenizer.vocab_size
        self._named: dict[int, tuple[str, list[int] | None]] = {}  # a token may be listed thousands of times

    def named(self, token: int) -> tuple[str, list[int] | None]:
        """Its text, where U+FFFD stands for what is no whole character, and its bytes."""
        if token not in self._named:
            self._named[token] = self._found(token)
        return self._named[token]

    def _found(self, token: int) -> tuple[str, list[int] | None]:
        if self.tokenizer is None or token >= self.known:
            return f"token_id:{token}", None
        raw = self.tokenizer.token_bytes(token)
        return raw.decode("utf-8", "replace"), list(raw)


class ChatLogprobs:
    """`logprobs` of a chat completion's choice."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def of(self, entries: Iterable[TokenLogprobs]) -> dict[str, Any]:
        """An object for a whole answer, or for a chunk of it."""
        return {"content": [self._entry(entry) for entry in entries], "refusal": None}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in entry.top]
        return {**self._token(entry.token, entry.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._texts.named(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": raw}


class TextLogprobs:
    """`logprobs` of a completion's choice, in order: a token's text begins where the one before ends."""

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], echo: bool) -> None:
        """`prompt` is what was used; with `echo` its tokens are to come too, by `of_prompt`."""
        self._texts, self._length = texts, 0
        self._decoder = None if texts.tokenizer is None else texts.tokenizer.stream()
        if not echo:
            for token in prompt:
                self._place(token)
            self._length = 0

    def of(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """An object for a whole answer, or for a chunk of it."""
        return self._lists([(entry.token, entry) for entry in entries])

    def of_prompt(self, prompt: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The same for the prompt's tokens, of which the first has no probability."""
        return self._lists(list(zip(prompt, entries, strict=True)))

    def _lists(self, tokens: list[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        return {
            "tokens": [self._texts.named(token)[0] for token, _ in tokens],
            "token_logprobs": [None if entry is None else max(entry.logprob, LEAST) for _, entry in tokens],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in tokens],
            "text_offset": [self._place(token) for token, _ in tokens],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """By text: of tokens that read alike, the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            text = self._texts.named(token)[0]
            top[text] = max(logprob, LEAST, top.get(text, LEAST))
        return top

    def _place(self, token: int) -> int:
        """Where the token's text begins; that of one within a character, where the character does."""
        place = self._length
        if self._decoder is not None and token < self._texts.known:
            self._length += len(self._decoder.push(token))
        return place


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The lists of a prompt and of its answer as one."""
    return {name: first[name] + second[name] for name in first}


def end_tokens(request: Request) -> frozenset[int]:
    """Tokens that end an answer and are no part of what it says."""
    params = request.params
    return frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(request.end_ids))


def said(
    entries: Sequence[TokenLogprobs], finish_reason: str | None, ends: frozenset[int]
) -> Sequence[TokenLogprobs]:
    """The entries without that of the token which ended the answer."""
    ended = finish_reason == "stop" and bool(entries) and entries[-1].token in ends
    return entries[:-1] if ended else entries

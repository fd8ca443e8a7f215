"""Finished completions → the objects that OpenAI's API answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puna.engine.completion import Completion
from puna.serve.calls import ToolCallReader, answer_message
from puna.serve.jobs import Job
from puna.serve.logprobs import ChatLogprobs, TextLogprobs, TokenTexts, end_tokens, joined, said
from puna.serve.prompts import Task
from puna.serve.schema import CompletionRequest
from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Frame:
    """What all parts of a response say alike."""

    id: str
    created: int
    model: str
    fingerprint: str
    texts: TokenTexts

    def around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A response, or a chunk of one."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def usage_of(task: Task, jobs: Sequence[Job]) -> dict[str, int]:
    """Tokens of finished jobs: of the prompts as used, and all that the model produced for the response."""
    prompt = sum(len(job.answer.tracks[0].sequence.prompt) for job in jobs)
    produced = sum(len(track.sequence.tokens) for job in jobs for track in job.answer.tracks)
    if scores_only(task):
        produced = 0
    return {"prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced}


def scores_only(task: Task) -> bool:
    """Whether the prompt alone is wanted back: the one token that is made is no part of the response."""
    return isinstance(task.asked, CompletionRequest) and task.asked.max_tokens == 0


def chat_response(frame: Frame, task: Task, completions: Sequence[Completion]) -> dict[str, Any]:
    """A chat.completion."""
    (first,) = completions
    answers = enumerate((first, *first.alternatives))
    return frame.around("chat.completion", [_chat_choice(frame, task, n, answer) for n, answer in answers])


def text_response(frame: Frame, task: Task, completions: Sequence[Completion]) -> dict[str, Any]:
    """A text_completion: the answers to the first prompt, then those to the next."""
    answers = [
        (prompt, first, answer)
        for prompt, first in enumerate(completions)
        for answer in (first, *first.alternatives)
    ]
    choices = [_text_choice(frame, task, number, *answer) for number, answer in enumerate(answers)]
    return frame.around("text_completion", choices)


def call_reader(task: Task) -> ToolCallReader | None:
    """What reads an answer that may be a call; None where it cannot be."""
    binding = task.binding
    if not binding.calls:
        return None
    return ToolCallReader(binding.ends, binding.names, binding.formed)


def echo_text(tokenizer: Tokenizer | None, task: Task, prompt: int, used: Sequence[int]) -> str:
    """A prompt's text: as it was given, or where it came as ids or was cut, what the ids used say."""
    given = task.echoes[prompt]
    if given is not None and len(used) == len(task.requests[prompt].prompt):
        return given
    if tokenizer is None:
        return ""
    return tokenizer.decode(token for token in used if token < tokenizer.vocab_size)


def _chat_choice(frame: Frame, task: Task, index: int, answer: Completion) -> dict[str, Any]:
    reason: str | None = answer.finish_reason
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if (reader := call_reader(task)) is not None:
        told, reason = answer_message(reader, answer.text, reason)
        message |= told
    logprobs = None
    if answer.logprobs is not None:
        entries = said(answer.logprobs, answer.finish_reason, end_tokens(task.requests[0]))
        logprobs = ChatLogprobs(frame.texts).of(entries)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _text_choice(
    frame: Frame, task: Task, index: int, prompt: int, first: Completion, answer: Completion
) -> dict[str, Any]:
    asked = task.asked
    assert isinstance(asked, CompletionRequest)
    text = "" if scores_only(task) else answer.text
    if asked.echo:
        text = echo_text(frame.texts.tokenizer, task, prompt, answer.prompt_tokens) + text
    return {
        "index": index,
        "text": text,
        "logprobs": None if answer.logprobs is None else _text_logprobs(frame, task, prompt, first, answer),
        "finish_reason": "length" if scores_only(task) else answer.finish_reason,
    }


def _text_logprobs(
    frame: Frame, task: Task, prompt: int, first: Completion, answer: Completion
) -> dict[str, Any]:
    echo, used = first.prompt_logprobs is not None, answer.prompt_tokens
    lists = TextLogprobs(frame.texts, used, echo)
    before = lists.of_prompt(used, first.prompt_logprobs) if first.prompt_logprobs is not None else None
    entries = said(answer.logprobs or (), answer.finish_reason, end_tokens(task.requests[prompt]))
    after = lists.of(() if scores_only(task) else entries)
    return after if before is None else joined(before, after)

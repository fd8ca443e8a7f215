"""Pieces of answers → server-sent events, built by hand: of a chunk only what changes is written anew."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from puna.engine.params import TokenLogprobs
from puna.serve.calls import ToolCallReader
from puna.serve.faults import Fault
from puna.serve.jobs import Delta, Job
from puna.serve.logprobs import ChatLogprobs, TextLogprobs, end_tokens, joined, said
from puna.serve.prompts import Task
from puna.serve.responses import Frame, call_reader, echo_text, scores_only
from puna.serve.schema import ChatRequest, CompletionRequest

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"  # a comment, which clients pass over: it keeps a connection from looking dead


class Chunks(Protocol):
    """What of a stream differs between conversations and completions of prompts."""

    def of(self, prompt: int, job: Job, delta: Delta) -> bytes:
        """The events for what came to an answer to a prompt; empty where there is nothing to tell yet."""


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def fault_event(fault: Fault) -> bytes:
    """What a stream ends with where it fails."""
    return event(fault.body)


def usage_event(frame: Frame, kind: str, usage: dict[str, int]) -> bytes:
    """The chunk after the last one, without choices."""
    return event({**frame.around(kind, []), "usage": usage})


class _Around:
    """What stands before and after the choice in each chunk of a stream."""

    def __init__(self, frame: Frame, kind: str, task: Task) -> None:
        options = task.asked.stream_options
        told = options is not None and options.include_usage
        before, _, after = event(frame.around(kind, [])).partition(b"[]")
        self._before = before + b"["
        self._after = b"]" + (b',"usage":null' if told else b"") + after

    def chunk(self, choice: str) -> bytes:
        """A chunk of one choice, which is JSON."""
        return self._before + choice.encode() + self._after


@dataclass
class _Turn:
    """How far the stream of one choice is."""

    reader: ToolCallReader | None = None
    opened: bool = False


class ChatChunks:
    """Chunks of a conversation's answers."""

    KIND = "chat.completion.chunk"

    def __init__(self, frame: Frame, task: Task) -> None:
        self._around = _Around(frame, self.KIND, task)
        assert isinstance(task.asked, ChatRequest)
        self._turns = [_Turn(call_reader(task)) for _ in range(task.asked.n or 1)]
        self._logprobs = ChatLogprobs(frame.texts) if task.asked.logprobs else None
        self._ends = end_tokens(task.requests[0])

    def of(self, prompt: int, job: Job, delta: Delta) -> bytes:
        """The events for what came to an answer."""
        turn, reason = self._turns[delta.index], delta.finish_reason
        logprobs = self._listed(delta)
        if turn.reader is None:
            return self._event(delta.index, {"content": delta.text}, logprobs, reason)
        return self._told(turn.reader, delta, logprobs)

    def _told(self, reader: ToolCallReader, delta: Delta, logprobs: str) -> bytes:
        """What a reader of calls makes of it: any number of deltas, the last one with the reason."""
        told, reason = reader.push(delta.text), None
        if delta.finish_reason is not None:
            rest, reason = reader.finish(delta.finish_reason)
            told = [*told, *rest]
        *before, last = told or [{}]
        events = [self._event(delta.index, part, "null", None) for part in before]
        return b"".join([*events, self._event(delta.index, last, logprobs, reason)])

    def _event(self, index: int, part: dict[str, Any], logprobs: str, reason: str | None) -> bytes:
        turn = self._turns[index]
        if not (part.get("content") or "tool_calls" in part):
            if reason is None and logprobs == "null":
                return b""
            part = {}
        if not turn.opened:
            turn.opened = True
            part = {"role": "assistant", "content": None if "tool_calls" in part else "", **part}
        return self._around.chunk(
            f'{{"index":{index},"delta":{json.dumps(part)},"logprobs":{logprobs},'
            f'"finish_reason":{json.dumps(reason)}}}'
        )

    def _listed(self, delta: Delta) -> str:
        if self._logprobs is None:
            return "null"
        entries = said(delta.logprobs, delta.finish_reason, self._ends)
        return json.dumps(self._logprobs.of(entries)) if entries else "null"


class TextChunks:
    """Chunks of the answers to prompts: those to the first prompt are numbered first."""

    KIND = "text_completion"

    def __init__(self, frame: Frame, task: Task) -> None:
        self._around, self._frame, self._task = _Around(frame, self.KIND, task), frame, task
        assert isinstance(task.asked, CompletionRequest)
        self._asked = task.asked
        self._lists: dict[int, TextLogprobs] = {}
        self._echoed: set[int] = set()

    def of(self, prompt: int, job: Job, delta: Delta) -> bytes:
        """The events for what came to an answer to a prompt."""
        choice = prompt * (self._asked.n or 1) + delta.index
        silent, reason = scores_only(self._task), delta.finish_reason
        text = "" if silent else delta.text
        entries = () if silent else said(delta.logprobs, reason, end_tokens(job.answer.request))
        first = bool(self._asked.echo) and choice not in self._echoed
        if not (text or entries or reason or first):
            return b""
        logprobs = self._listed(choice, job, entries, first)
        if first:
            self._echoed.add(choice)
            text = self._echo(prompt, job) + text
        reason = "length" if silent and reason else reason
        return self._around.chunk(
            f'{{"index":{choice},"text":{json.dumps(text)},"logprobs":{logprobs},'
            f'"finish_reason":{json.dumps(reason)}}}'
        )

    def _echo(self, prompt: int, job: Job) -> str:
        used = job.answer.tracks[0].sequence.prompt
        return echo_text(self._frame.texts.tokenizer, self._task, prompt, used)

    def _listed(self, choice: int, job: Job, entries: Any, echo: bool) -> str:
        if self._asked.logprobs is None:
            return "null"
        lists = self._lists_of(choice, job)
        before = None
        if echo:  # once a token has come, the whole prompt has been computed
            sequence = job.answer.tracks[0].sequence
            before = lists.of_prompt(sequence.prompt, sequence.prompt_logprobs)
        told: tuple[TokenLogprobs, ...] = tuple(entries)
        if before is None:
            return json.dumps(lists.of(told)) if told else "null"
        return json.dumps(joined(before, lists.of(told)))

    def _lists_of(self, choice: int, job: Job) -> TextLogprobs:
        if choice not in self._lists:
            prompt = job.answer.tracks[0].sequence.prompt
            self._lists[choice] = TextLogprobs(self._frame.texts, prompt, bool(self._asked.echo))
        return self._lists[choice]

"""What every route can reach: the model, its engine at work, the settings, the figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from puna.engine.llm import LLM
from puna.serve.aside import Aside
from puna.serve.record import Record
from puna.serve.settings import ServeSettings
from puna.serve.worker import EngineThread, Observer

BESIDE = 1 << 20  # bytes of a body beside its prompt
TOKEN_BYTES = 32  # of a long token, escaped as JSON


class Figures(Observer, Protocol):
    """What has been measured since the server started."""

    def finished(self, record: Record) -> None:
        """An HTTP request has ended. Called by the guard, in the event loop."""

    def exposition(self) -> bytes:
        """In Prometheus' text format."""

    def status(self, state: ServerState) -> dict[str, Any]:
        """What the live view shows, as JSON."""


@dataclass
class ServerState:
    """A server while it runs; `app.state.server`."""

    llm: LLM
    worker: EngineThread
    settings: ServeSettings
    model_id: str
    """What `/v1/models` calls the model."""
    names: frozenset[str]
    """By which clients may name it, `model_id` included."""
    fingerprint: str
    """Of model and program: the same one means the same answers to the same requests."""
    created: int
    """When the server started, in seconds since 1970."""
    metrics: Figures
    aside: Aside = field(default_factory=Aside)
    """Where what takes long is done, beside the event loop."""
    draining: bool = False
    """Whether it takes on nothing new, and ends when all is answered."""

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token; 0 without a tokenizer."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            return 0
        return max(len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size))

    @property
    def most_body(self) -> int:
        """Bytes that a request's body may have."""
        return self.settings.max_body_bytes or BESIDE + TOKEN_BYTES * self.llm.context

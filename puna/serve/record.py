"""What is known of one HTTP request: who asked, for what, how it went. Logs and metrics are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """The guard makes one for each request and puts it into `scope["state"]["record"]`; routes fill it in.

    Times are seconds of `time.monotonic`.
    """

    id: str
    method: str
    path: str
    arrived: float
    key: str | None = None
    """The name of the API key it came with."""
    route: str | None = None
    """The path as the app declares it, such as /v1/models/{id}: one of few, unlike `path`."""
    status: int | None = None
    """None: nothing was sent."""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    queued: float | None = None
    """Seconds from the arrival until its first sequence was computed."""
    first_token: float | None = None
    """Seconds from the arrival to the first token."""
    error: str | None = None
    """What the client was told, or what went wrong after the first byte."""
    gone: bool = False
    """Whether the client left before the end."""
    prompt: Any = None
    """What was asked, and `answer` what was said: filled in where settings say `log_prompts`."""
    answer: Any = None

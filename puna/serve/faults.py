"""What goes wrong, as HTTP says it: statuses, and bodies as OpenAI's API writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from puna.errors import InputError, ResourceError
from puna.progress import counted
from puna.serve.worker import QueueFull, Stopped

INVALID, SERVER = "invalid_request_error", "server_error"


class BadRequest(InputError):
    """A request is at fault; `status`, `param` and `code` go into the response."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class TooLate(Exception):
    """A request took longer than the server's settings let it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"this was not done within {counted(seconds, 'second')}; ask for less at once")


@dataclass(frozen=True)
class Fault:
    """What a client is told."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        return error_body(self.message, self.kind, self.param, self.code)

    @property
    def content(self) -> bytes:
        """The same as JSON."""
        return json.dumps(self.body).encode()


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error response: {"error": {"message", "type", "param", "code"}}."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def fault_of(error: BaseException) -> Fault:
    """What to tell a client of an error; of one that is no fault of the client's, without details."""
    match error:
        case BadRequest():
            return Fault(error.status, str(error), INVALID, error.param, error.code)
        case QueueFull():
            wait = {"Retry-After": str(error.retry_after)}
            return Fault(429, str(error), "rate_limit_error", code="queue_full", headers=wait)
        case Stopped() | ResourceError():  # before InputError, which it is one of: memory is short just now
            told = str(error).replace("max_new_tokens", "max_tokens")  # as it is called here
            return Fault(503, told, SERVER, code="unavailable", headers={"Retry-After": "1"})
        case InputError():
            return Fault(400, str(error), INVALID)
        case TooLate():
            return Fault(504, str(error), SERVER, code="timeout")
    return Fault(500, "the server failed to answer this; its log says why", SERVER, code="internal_error")

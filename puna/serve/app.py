"""The app: every route of the server, from its path to what answers it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route

from puna import __version__
from puna.errors import InputError, nearest
from puna.serve import answers, pages
from puna.serve.aside import unless_left
from puna.serve.bodies import CLOSE
from puna.serve.description import WITH_BODY, body_of, describe, faults
from puna.serve.exchange import CHAT, TEXT, Exchange, Kind, told
from puna.serve.faults import INVALID, error_body
from puna.serve.prompts import applied, check_model, template_name
from puna.serve.record import Record
from puna.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from puna.serve.state import ServerState
from puna.serve.tokens import detokenized, tokenized
from puna.serve.worker import QueueFull, Stopped

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EVENT_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
PAGE = {"text/html": {"schema": {"type": "string"}}}
METRICS = {"text/plain": {"schema": {"type": "string"}}}
CLIENT_LEFT = 400  # nobody sees it
NOT_FOUND, NOT_TAKEN = 404, 405
FAILURES = 8  # in a row, after which the device or the program is broken rather than a request


def make_app(state: ServerState) -> FastAPI:
    """The app of a server, without what guards it."""
    app = FastAPI(
        title="Puna",
        version=__version__,
        description="A model behind the API that OpenAI's clients speak.",
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            HTTPException: _http_fault,
            ClientDisconnect: _client_left,
            **dict.fromkeys((InputError, QueueFull, Stopped, Exception), _fault),
        },
    )
    app.state.server = state
    _add_completions(app)
    _add_tokens(app)
    _add_models(app)
    _add_operation(app)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


def _add_completions(app: FastAPI) -> None:
    for path, endpoint, shape, answer in (
        ("/v1/chat/completions", chat_completions, ChatRequest, answers.ChatCompletion),
        ("/v1/completions", completions, CompletionRequest, answers.Completions),
    ):
        done = {
            "model": answer,
            "description": "The answer; a stream of it where asked.",
            "content": EVENT_STREAM,
        }
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            responses={200: done, **faults(*WITH_BODY)},
            openapi_extra=body_of(shape),
        )


def _add_tokens(app: FastAPI) -> None:
    for path, endpoint, shape, answer in (
        ("/tokenize", tokenize, TokenizeRequest, answers.Tokens),
        ("/detokenize", detokenize, DetokenizeRequest, answers.Detokenized),
        ("/apply-template", apply_template, ChatRequest, answers.AppliedTemplate),
    ):
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            responses={200: {"model": answer}, **faults(*WITH_BODY)},
            openapi_extra=body_of(shape),
        )


def _add_models(app: FastAPI) -> None:
    _get(app, "/v1/models", models, answers.ModelList)
    named = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    _get(app, "/v1/models/{id:path}", model, answers.ModelEntry, {"parameters": [named]})


def _add_operation(app: FastAPI) -> None:
    _get(app, "/health", health, answers.Health)
    _get(app, "/ready", ready, answers.Health)
    for path, endpoint, content in (("/metrics", metrics, METRICS), ("/", page, PAGE)):
        _get(app, path, endpoint, None, {}, content)
    _get(app, "/status", status, answers.Status, {}, PAGE)


def _get(
    app: FastAPI,
    path: str,
    endpoint: Callable[..., Any],
    answer: type[Any] | None,
    extra: dict[str, Any] | None = None,
    content: dict[str, Any] | None = None,
) -> None:
    done: dict[str, Any] = {"description": "As asked."}
    done |= {"model": answer} if answer is not None else {}
    done |= {"content": content} if content is not None else {}
    app.add_api_route(
        path,
        endpoint,
        methods=["GET"],
        response_model=None,
        response_class=Response,
        responses={200: done, **faults()},
        openapi_extra=extra or None,
    )
    app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _exchange(request, CHAT)


async def completions(request: Request) -> Response:
    """Continue prompts."""
    return await _exchange(request, TEXT)


async def tokenize(request: Request) -> Response:
    """Which ids a text becomes."""
    return await _computed(request, tokenized)


async def detokenize(request: Request) -> Response:
    """Which text ids become."""
    return await _computed(request, detokenized)


async def apply_template(request: Request) -> Response:
    """The prompt, as text and as ids, that a conversation becomes."""
    return await _computed(request, applied)


async def models(request: Request) -> Response:
    """The models that are served: one."""
    return _json({"object": "list", "data": [_entry(_server(request))]})


async def model(request: Request) -> Response:
    """A model that is served."""
    state = _server(request)
    check_model(state, request.path_params["id"])
    return _json(_entry(state))


async def health(request: Request) -> Response:
    """Whether the engine works."""
    worker = _server(request).worker
    if worker.fault is not None:
        return _unavailable("the engine has failed")
    if worker.failures >= FAILURES:
        return _unavailable(f"the last {worker.failures:,} answers ended in faults of the server's own")
    return _json({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether new requests are taken on."""
    if _server(request).draining:
        return _unavailable("the server is stopping")
    return await health(request)


async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format."""
    return Response(_server(request).metrics.exposition(), media_type=METRICS_TYPE)


async def page(request: Request) -> Response:
    """The page to talk to the model."""
    return pages.chat_page(request.headers.get("if-none-match"))


async def status(request: Request) -> Response:
    """The live view: a page, or its figures as JSON where that is asked for."""
    if "application/json" in request.headers.get("accept", ""):
        state = _server(request)
        return _json(state.metrics.status(state))
    return pages.status_page(request.headers.get("if-none-match"))


async def _exchange(request: Request, kind: Kind) -> Response:
    return Exchange(_server(request), kind, await request.body(), _record(request))


async def _computed(request: Request, work: Callable[[ServerState, bytes], dict[str, Any]]) -> Response:
    """What may take long is done on a thread, so that nobody else waits."""
    state, body = _server(request), await request.body()
    working = state.aside.do(len(body), lambda: json.dumps(work(state, body)))
    arrived, seconds = _record(request).arrived, state.settings.request_seconds
    content = await unless_left(working, request.receive, arrived, seconds)
    return Response(content, media_type="application/json")


def _server(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def _record(request: Request) -> Record:
    """The guard's, or one that nobody looks at."""
    known: Record | None = request.scope.get("state", {}).get("record")
    return known or Record("-", request.method, request.url.path, time.monotonic())


def _entry(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model_id,
        "object": "model",
        "created": state.created,
        "owned_by": "puna",
        "context": state.llm.context,
        "max_model_len": state.llm.context,
        "template": template_name(state),
    }


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")


def _unavailable(message: str) -> Response:
    return _json(error_body(message, "server_error", code="unavailable"), 503, {"Retry-After": "1"})


async def _fault(request: Request, error: Exception) -> Response:
    fault = told(error, _record(request))
    return _json(fault.body, fault.status, fault.headers)


async def _http_fault(request: Request, error: Exception) -> Response:
    """A path or a method that is not there."""
    assert isinstance(error, HTTPException)
    here, headers = f"{request.method} {request.url.path}", dict(error.headers or {})
    message = str(error.detail)
    if error.status_code == NOT_FOUND:
        near = nearest(request.url.path, [route.path for route in _routes(request)], CLOSE)
        message = f"no such path: {here}; /openapi.json has them all.{near}"
    elif error.status_code == NOT_TAKEN:
        headers["Allow"] = allowed = ", ".join(_methods(request))
        message = f"{here} is not taken here; this path takes {allowed}"
    _record(request).error = message
    return _json(error_body(message, INVALID), error.status_code, headers)


def _routes(request: Request) -> list[Route]:
    return [route for route in request.app.routes if isinstance(route, Route)]


def _methods(request: Request) -> list[str]:
    """That the path asked for takes."""
    here = [route for route in _routes(request) if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in here for method in route.methods or ()})


async def _client_left(request: Request, error: Exception) -> Response:
    _record(request).gone = True
    return Response(status_code=CLIENT_LEFT)

"""The API's own description, which /openapi.json gives: every route, shape and status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from puna.serve.answers import Error
from puna.serve.schema import Body, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

REQUESTS: tuple[type[Body], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
REFERENCE = "#/components/schemas/{model}"
FAULTS = {
    400: "The request is at fault; the message says what and how to mend it.",
    401: "Keys are needed here, and none that is known came.",
    403: "By this host name, or from this page, the server is not to be asked.",
    404: "No such path, or no such model.",
    405: "The path does not take this method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON, or its content type does not say so.",
    429: "Too many answers wait, or this key asks too often; Retry-After says when to come again.",
    431: "The headers are too large.",
    500: "A fault of the server's.",
    503: "The server is stopping, or its engine has failed.",
    504: "The answer was not done in time.",
}
ANYWHERE = (400, 401, 403, 404, 405, 429, 431, 500, 503)
WITH_BODY = (408, 413, 415, 504)
SECURITY = {
    "key": {"type": "http", "scheme": "bearer", "description": "A key, where the server has any."},
}


def faults(*more: int) -> dict[int | str, dict[str, Any]]:
    """The responses that any route may give besides its own."""
    return {status: {"model": Error, "description": FAULTS[status]} for status in sorted({*ANYWHERE, *more})}


def body_of(shape: type[Body]) -> dict[str, Any]:
    """What a route says of its request's body."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=shape.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The description as OpenAPI has it."""
    described = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, requests = models_json_schema([(shape, "validation") for shape in REQUESTS], ref_template=REFERENCE)
    components = described.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **requests["$defs"]}
    components["securitySchemes"] = SECURITY
    described["security"] = [{}, {"key": []}]
    return described

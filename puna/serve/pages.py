"""The two pages as responses: each whole in one file, and headers that let nothing else run or load."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from functools import cache

from starlette.responses import Response

# Attributes may stand in the tags, nothing but the closing tag ends the text: as browsers read both elements.
_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL)

_POLICY = (
    "default-src 'none'",
    "connect-src 'self'",
    "img-src data:",  # the icon in the tab; pages never make an image of what a model says
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    # Assigning markup (innerHTML and its like) throws, so that text of a model can only become text.
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)


def chat_page(known: str | None = None) -> Response:
    """The chat page; `known` is the request's If-None-Match: 304 without a body where it names this page."""
    return _response("chat.html", known)


def status_page(known: str | None = None) -> Response:
    """The live view; `known` as for `chat_page`."""
    return _response("status.html", known)


def _response(name: str, known: str | None) -> Response:
    body, headers = _page(name)
    unchanged = known is not None and headers["ETag"] in (tag.strip() for tag in known.split(","))
    return Response(
        b"" if unchanged else body,
        status_code=304 if unchanged else 200,
        headers=headers,
        media_type="text/html",  # Starlette adds the charset
    )


@cache
def _page(name: str) -> tuple[bytes, dict[str, str]]:
    """A page's bytes and headers; read once, since neither changes while a server runs."""
    body = importlib.resources.files("puna.serve").joinpath("page", name).read_bytes()
    headers = {
        "Content-Security-Policy": "; ".join((*_POLICY, *_hashes(body.decode()))),
        "Cache-Control": "no-cache",  # kept, and asked about each time: a newer server has newer pages
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept",  # /status is JSON for those who ask for it
        "X-Content-Type-Options": "nosniff",
    }
    return body, headers


def _hashes(page: str) -> list[str]:
    """script-src and style-src that admit exactly the page's own elements (CSP 3, section 2.3.1)."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return [f"{kind}-src {' '.join(found)}" for kind, found in hashes.items()]

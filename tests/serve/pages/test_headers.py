"""What the pages' headers allow; no browser is needed."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from typing import Any

import pytest

from puna.serve.pages import chat_page, status_page


@pytest.mark.parametrize(("name", "page"), [("chat.html", chat_page), ("status.html", status_page)])
def test_headers_let_run_the_pages_own_scripts_and_nothing_else(name: str, page: Any) -> None:
    response = page()
    text = importlib.resources.files("puna.serve").joinpath("page", name).read_text("utf-8")
    assert response.body.decode() == text and response.headers["content-type"] == "text/html; charset=utf-8"
    parts = response.headers["content-security-policy"].split("; ")
    policy = {part.split()[0]: part.split()[1:] for part in parts}
    for kind in ("script", "style"):
        inline = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inline]
        assert policy[f"{kind}-src"] == [f"'sha256-{digest}'" for digest in digests] != []
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert policy["connect-src"] == ["'self'"] and policy["require-trusted-types-for"] == ["'script'"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_a_page_that_the_browser_has_is_not_sent_again() -> None:
    first = chat_page()
    again = chat_page(f'"other", {first.headers["etag"]}')
    assert (first.status_code, again.status_code, again.body) == (200, 304, b"")
    assert again.headers["etag"] == first.headers["etag"] != status_page().headers["etag"]
    assert chat_page('"other"').status_code == 200
    assert first.headers["cache-control"] == "no-cache"

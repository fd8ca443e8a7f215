"""The live view."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.pages.stage import MODEL, Stage
from tests.serve.pages.watching import ATTACKS, audited, expect, watched


def test_the_live_view_shows_the_figures(live: Any, stage: Stage) -> None:
    expect(live.get_by_role("heading", level=1)).to_have_text(MODEL)
    expect(live.get_by_role("status")).to_have_text("Serving")
    for name, text in {
        "running": "12",
        "waiting": "3",
        "rate": "412",
        "cache": "40%",
        "requests": "1,871",
    }.items():
        expect(live.locator(f"#{name}")).to_have_text(text)
    assert live.locator("#latency tr").all_inner_texts()[1:] == [
        "First token\narrival to the first token\n\t87.0 ms\t310 ms\t1.24 s",
        "Each token\nbetween two tokens of an answer\n\t23.1 ms\t29.7 ms\t41.2 ms",
        "Whole answer\narrival to the end\n\t4.31 s\t12.8 s\t2 min 7 s",
    ]
    expect(live.locator("#errors")).to_contain_text("temperature: expected a number ≥ 0, got -1")
    stage.status = stage.status | {"running": 13, "draining": True, "errors": []}
    expect(live.locator("#running")).to_have_text("13")
    expect(live.get_by_role("status")).to_contain_text("Draining")
    expect(live.locator("#errors tr")).to_have_count(0)
    assert live.locator("#spark .line").get_attribute("d").count("L") == 1  # two points, one stroke


def test_the_live_view_says_when_nobody_answers(live: Any, stage: Stage) -> None:
    expect(live.locator("#running")).to_have_text("12")
    live.route("**/status", lambda route: route.abort())
    expect(live.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(live.get_by_role("status")).to_have_text("Unreachable")
    live.unroute("**/status")
    expect(live.get_by_role("status")).to_have_text("Serving")
    expect(live.get_by_role("alert")).to_be_hidden()


def test_a_server_that_has_done_nothing_yet_is_shown_too(live: Any, stage: Stage) -> None:
    nothing = {"p50": None, "p95": None, "p99": None}
    stage.status = stage.status | {
        "latency_seconds": dict.fromkeys(stage.status["latency_seconds"], nothing),
        "requests": {},
        "errors": [],
        "tokens_per_second": {"10s": 0.0, "60s": 0.0},
    }
    live.reload()
    expect(live.locator("#latency td").first).to_have_text("–")
    expect(live.locator("#requests")).to_have_text("0")
    expect(live.get_by_text("None.")).to_be_visible()


def test_nothing_an_error_in_the_live_view_says_runs(live: Any, stage: Stage) -> None:
    error = stage.status["errors"][0] | {
        "message": ATTACKS[1],
        "route": ATTACKS[0],
        "key": ATTACKS[2],
        "id": ATTACKS[3],
    }
    stage.status = stage.status | {"errors": [error], "model": ATTACKS[1]}
    live.reload()
    expect(live.locator("#errors")).to_contain_text(ATTACKS[1])
    assert live.locator("main :is(script, img, iframe, style)").count() == 0
    assert live.evaluate("typeof pwned") == "undefined"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_live_view_passes_the_audit(browser: Any, stage: Stage, scheme: str) -> None:
    for page in watched(browser, stage, "/status", color_scheme=scheme, bypass_csp=True):
        expect(page.locator("#running")).to_have_text("12")
        audited(page)

"""The live view."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.pages.stage import MODEL, Stage
from tests.serve.pages.watching import ATTACKS, audited, expect, watched

pytestmark = pytest.mark.slow  # a browser takes a second for each


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
    latencies = [
        "Waiting arrival until the model begins 2.10 ms 34.0 ms 180 ms",
        "First token arrival to the first token 87.0 ms 310 ms 1.24 s",
        "Each token between two tokens of an answer 23.1 ms 29.7 ms 41.2 ms",
        "Whole answer arrival to the end 4.31 s 12.8 s 2 min 7 s",
    ]
    expect(live.locator("#latency tr")).to_have_text(latencies, use_inner_text=True)
    expect(live.locator("#errors")).to_contain_text("temperature: expected a number ≥ 0, got -1")
    stage.status = stage.status | {"running": 13, "draining": True, "errors": []}
    expect(live.locator("#running")).to_have_text("13")
    expect(live.get_by_role("status")).to_contain_text("Draining")
    expect(live.locator("#errors tr")).to_have_count(0)
    strokes = live.locator("#spark .line").get_attribute("d").count("L")
    assert strokes >= 1  # a point for every look so far, a stroke between two


def test_the_live_view_says_what_is_served(live: Any, stage: Stage) -> None:
    expect(live.locator("#facts")).to_have_text(
        "bfloat16 · cpu · 2 threads · context of 4,096 tokens · cache for 32,768 tokens"
        " · chat template: its own"
    )
    stage.status = {name: value for name, value in stage.status.items() if name != "model_facts"}
    expect(live.locator("#facts")).to_be_hidden()


def test_a_few_errors_are_shown_and_all_on_demand(live: Any, stage: Stage) -> None:
    error = stage.status["errors"][0]
    stage.status = stage.status | {"errors": [error | {"id": f"{index:032x}"} for index in range(50)]}
    rows = live.locator("#errors tr")
    expect(rows).to_have_count(10)
    assert live.evaluate("document.documentElement.scrollHeight") < 1600
    live.get_by_role("button", name="Show all 50").click()
    expect(rows).to_have_count(50)
    live.get_by_role("button", name="Show the last 10").click()
    expect(rows).to_have_count(10)
    one = rows.nth(3).get_by_role("button")
    assert one.bounding_box()["height"] < 30  # one line
    expect(one).to_have_attribute("title", f"{3:032x}")
    live.context.grant_permissions(["clipboard-read", "clipboard-write"])
    one.click()
    expect(live.locator("#spoken")).to_have_text("Copied")
    assert live.evaluate("navigator.clipboard.readText()") == f"{3:032x}"
    stage.status = stage.status | {"errors": [error, *stage.status["errors"][:-1]]}
    expect(rows.nth(4).get_by_role("button")).to_be_focused()  # with one more above it


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
    expect(live.get_by_text("No tokens lately.")).to_be_visible()
    expect(live.locator("#spark")).to_be_hidden()
    stage.status = stage.status | {"tokens_per_second": {"10s": 5.0, "60s": 1.0}}
    expect(live.locator("#spark")).to_be_visible()


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
        errors = [stage.status["errors"][0] | {"id": str(index)} for index in range(11)]
        stage.status = stage.status | {"errors": errors}
        page.reload()
        expect(page.get_by_role("button", name="Show all 11")).to_be_visible()
        audited(page)

"""Answers as they are shown, whole or growing, long or hostile."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.pages.stage import Stage
from tests.serve.pages.watching import ATTACKS, MARKDOWN, answers, ask, expect, finished, imported, set_up

pytestmark = pytest.mark.slow  # a browser takes a second for each

RENDERED = [
    ("a\nb", '<p dir="auto">a<br>b</p>'),
    ("**a *b* c**", '<p dir="auto"><strong>a <em>b</em> c</strong></p>'),
    ("***a*** ~~b~~ `*c*`", '<p dir="auto"><strong><em>a</em></strong> <s>b</s> <code>*c*</code></p>'),
    ("2 * 3 * 4, a_b_c, \\*d\\*, **e", '<p dir="auto">2 * 3 * 4, a_b_c, *d*, **e</p>'),
    ("``a ` b``", '<p dir="auto"><code>a ` b</code></p>'),
    ("### C\n# A", '<h3 class="h h3" dir="auto">C</h3><h3 class="h h1" dir="auto">A</h3>'),
    (
        "- a\n- b\n  1. c",
        '<ul><li dir="auto"><p dir="auto">a</p></li><li dir="auto"><p dir="auto">b</p>'
        '<ol><li dir="auto"><p dir="auto">c</p></li></ol></li></ul>',
    ),
    ("7) a", '<ol start="7"><li dir="auto"><p dir="auto">a</p></li></ol>'),
    ("> a\n\nb", '<blockquote><p dir="auto">a</p></blockquote><p dir="auto">b</p>'),
    ("***", "<hr>"),
]  # fmt: skip


def test_markdown_becomes_what_it_means(chat: Any) -> None:
    messages = [{"role": "assistant", "content": text} for text, _ in RENDERED]
    imported(chat, messages)
    expect(answers(chat)).to_have_count(len(RENDERED))
    shown = answers(chat).locator(".part").evaluate_all("all => all.map(node => node.innerHTML)")
    assert shown == [html for _, html in RENDERED]


def test_tables_code_and_links(chat: Any) -> None:
    imported(chat, [{"role": "assistant", "content": MARKDOWN}])
    prose = answers(chat).locator(".prose")
    assert prose.locator("tr").all_inner_texts() == ["Animal\tkg", "Llama\t155", "a | b\tx"]
    assert prose.locator("td").nth(1).evaluate("cell => getComputedStyle(cell).textAlign") == "end"
    code = 'def f():\n    return "```"\n\n~~~'
    assert prose.locator("pre").inner_text() == code
    assert prose.locator("a").evaluate_all(
        "all => all.map(a => [a.href, a.textContent, a.rel, a.target])"
    ) == [
        ["https://example.org/a_(b)", "the article", "noopener noreferrer nofollow ugc", "_blank"],
        ["https://example.org/c", "https://example.org/c", "noopener noreferrer nofollow ugc", "_blank"],
    ]
    assert prose.locator("ol").first.evaluate("list => list.start") == 3
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.get_by_label("Copy the code").click()
    assert chat.evaluate("navigator.clipboard.readText()") == code


@pytest.mark.parametrize("length", [1, 7])
def test_what_streams_looks_as_what_is_read_whole(chat: Any, stage: Stage, length: int) -> None:
    stage.pieces = [MARKDOWN[at : at + length] for at in range(0, len(MARKDOWN), length)]
    stage.pause = 0.01 if length == 7 else 0  # several are drawn at once, in every mixture
    streamed = ask(chat, "Everything").locator(".prose").inner_html()
    chat.reload()
    chat.locator("#conversations .title").click()
    assert finished(chat).locator(".prose").inner_html() == streamed


HUGE = {
    "one paragraph": "word " * 100_000,
    "paragraphs": "line\n\n" * 20_000,
    "code": "```\n" + "code\n" * 60_000,
    "list": "- item\n" * 20_000,
    "stray marks": "*[`_ " * 20_000,
    "nested quotes": "> " * 50_000,
    "spaces": "a | b\n-" + " " * 100_000 + "x",
    "wide table": "|a" * 50_000 + "\n" + "|-" * 50_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
def test_a_huge_answer_leaves_the_page_quick(chat: Any, stage: Stage, text: str) -> None:
    stage.pieces = [text[at : at + 4000] for at in range(0, len(text), 4000)]
    chat.evaluate(
        """() => {
            window.longest = 0;
            new PerformanceObserver(list => {
                for (const { duration } of list.getEntries()) longest = Math.max(longest, duration);
            }).observe({ type: "longtask" });
        }"""
    )
    ask(chat, "All of it")
    assert chat.evaluate("window.longest") < 5000  # milliseconds; what grows with the square takes minutes


def harmless(page: Any) -> None:
    """Nothing of what was said has become anything but text, links and the renderer's own elements."""
    assert page.evaluate("typeof pwned") == "undefined"
    forbidden = "script, style, img, iframe, svg:not(.symbol), object, embed, form, video, link, [onclick]"
    for place in ("#log", "#conversations", "#notes", "#title", "#tip"):
        assert page.locator(f"{place} :is({forbidden})").count() == 0, place
    addresses = page.locator("#log a").evaluate_all("all => all.map(a => a.protocol)")
    assert set(addresses) <= {"http:", "https:", "mailto:"}
    names = page.locator("#log .body *").evaluate_all("all => all.flatMap(e => e.getAttributeNames())")
    own = {
        "class",
        "dir",
        "href",
        "title",
        "target",
        "rel",
        "start",
        "tabindex",
        "role",
        "scope",
        "type",
        "style",
    }
    assert {name for name in names if not name.startswith(("aria-", "data-"))} <= own


def test_nothing_a_model_says_runs_or_loads(chat: Any, stage: Stage) -> None:
    stage.pieces = ["\n\n".join(ATTACKS)]
    answer = ask(chat, ATTACKS[0])
    harmless(chat)
    expect(answer.locator(".prose")).to_contain_text("<script>pwned = 1</script>")
    for link in answer.locator("a").all():
        assert link.get_attribute("href").startswith("https://outside.example/")


def test_no_token_runs_or_loads(chat: Any, stage: Stage) -> None:
    set_up(chat, logprobs=True)
    stage.pieces = ATTACKS
    answer = ask(chat, "Go")
    answer.locator(".tokens [role=option]").nth(1).hover()
    expect(chat.get_by_role("tooltip")).to_contain_text("<img")
    harmless(chat)


def test_nothing_an_imported_file_holds_runs_or_loads(chat: Any) -> None:
    attack = ATTACKS[1]
    message = {
        "id": "__proto__",
        "parent": None,
        "role": "assistant",
        "content": "\n\n".join(ATTACKS),
        "model": attack,
        "fault": attack,
        "finish": attack,
        "onclick": "pwned = 1",
        "logprobs": [[attack, -1, None, [[attack, -2]]]],
        "request": {"system": attack, "__proto__": {"pwned": 1}},
        "tokens": attack,
    }
    imported(
        chat, {"conversations": [{"id": attack, "title": attack, "leaf": "__proto__", "messages": [message]}]}
    )
    expect(answers(chat)).to_have_count(1)
    expect(answers(chat).locator(".fault")).to_contain_text(attack)
    expect(chat.locator("#conversations .title")).to_have_text([attack])
    harmless(chat)


def test_nothing_an_error_says_runs_or_loads(chat: Any, stage: Stage) -> None:
    stage.refusal = (400, ATTACKS[1])
    ask(chat, "Go")
    harmless(chat)
    stage.refusal, stage.note = None, "<img src=x>"
    chat.get_by_role("button", name="Try again").click()
    expect(chat.locator("[data-note=puna]")).to_contain_text("<img src=x>")
    harmless(chat)

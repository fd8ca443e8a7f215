"""Keyboard, screen readers, phones, light and dark."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.pages.stage import Stage
from tests.serve.pages.watching import MARKDOWN, answers, ask, audited, expect, finished, say, set_up, watched

pytestmark = pytest.mark.slow  # a browser takes a second for each


def test_the_keyboard_does_everything(chat: Any, stage: Stage) -> None:
    expect(chat.locator("#message")).to_be_focused()
    chat.keyboard.type("one")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("two")
    chat.keyboard.press("Enter")
    finished(chat)
    assert stage.messages == [{"role": "user", "content": "one\ntwo"}]
    expect(chat.locator("#message")).to_be_focused()
    chat.keyboard.press("Alt+r")
    expect(chat.locator(".versions")).to_contain_text("2 / 2")
    finished(chat)
    chat.keyboard.press("ArrowUp")
    expect(chat.locator(".editing textarea")).to_have_value("one\ntwo")
    chat.keyboard.press("Escape")
    stage.pieces, stage.pause = ["on "] * 500, 0.02
    chat.keyboard.type("long")
    chat.keyboard.press("Enter")
    expect(answers(chat).last.locator(".body")).to_contain_text("on on")
    chat.keyboard.press("Escape")
    expect(finished(chat, 2).locator(".stats")).to_contain_text("stopped")
    chat.keyboard.press("Control+/")
    expect(chat.get_by_role("dialog", name="Keyboard")).to_be_visible()
    chat.keyboard.press("Escape")
    chat.keyboard.press("Alt+,")
    expect(chat.get_by_role("dialog", name="Settings")).to_be_visible()
    chat.keyboard.press("Escape")
    chat.keyboard.press("Alt+n")
    expect(answers(chat)).to_have_count(0)
    chat.keyboard.press("Alt+l")
    expect(chat.get_by_role("navigation")).to_be_hidden()
    chat.keyboard.press("Alt+l")
    expect(chat.locator("#new")).to_be_focused()


def test_on_a_mac_alt_still_writes_letters(browser: Any, stage: Stage) -> None:
    for page in watched(browser, stage, "/"):
        page.add_init_script("Object.defineProperty(navigator, 'platform', { get: () => 'MacIntel' })")
        page.reload()
        page.keyboard.press("Alt+l")  # @ on many keyboards
        expect(page.get_by_role("navigation")).to_be_visible()
        page.keyboard.press("Control+Shift+l")
        expect(page.get_by_role("navigation")).to_be_hidden()


def test_the_keyboard_stays_where_it_is_when_an_answer_ends(chat: Any, stage: Stage) -> None:
    ask(chat, "One")
    stage.hold = 2
    say(chat, "Two")
    expect(answers(chat).last.locator(".prose")).to_have_text("All is")
    chat.get_by_label("Copy the answer").focus()
    stage.go.set()
    finished(chat, 2)
    expect(chat.get_by_label("Copy the answer").first).to_be_focused()


def test_words_being_composed_are_not_sent(chat: Any, stage: Stage) -> None:
    chat.locator("#message").fill("ni")
    chat.locator("#message").evaluate(
        "box => box.dispatchEvent("
        "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true }))"
    )
    assert stage.requests == [] and answers(chat).count() == 0


def test_screen_readers_hear_whole_paragraphs(chat: Any, stage: Stage) -> None:
    stage.pieces = [*"One.\n\nTwo.\n\n```\nx\ny\n```\n"]
    ask(chat, "Go")
    heard = chat.locator("#spoken p")
    expect(heard).to_have_text(["Answering", "One.", "Two.", "Code, 2 lines", "End of the answer, 24 tokens"])


def test_a_phone_shows_everything_without_sideways_scrolling(phone: Any, stage: Stage) -> None:
    stage.pieces = [MARKDOWN, "\n\n" + "long" * 200, "\n\n```\n" + "wide " * 100]
    phone.get_by_label("Message", exact=True).fill("x" * 300)
    phone.get_by_label("Send", exact=True).tap()
    finished(phone)
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    assert phone.locator("#scroller").evaluate("box => box.scrollWidth - box.clientWidth") == 0
    expect(phone.get_by_role("navigation")).to_be_hidden()
    phone.get_by_label("Show the list of conversations").tap()
    phone.get_by_role("button", name="New conversation").tap()
    expect(phone.get_by_role("navigation")).to_be_hidden()
    expect(answers(phone)).to_have_count(0)


def test_dark_and_light_follow_the_system_until_chosen(browser: Any, stage: Stage) -> None:
    for page in watched(browser, stage, "/", color_scheme="dark"):
        ground = "() => getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(ground) == "rgb(25, 24, 22)"
        page.get_by_label("Dark theme").click()
        assert page.evaluate(ground) == "rgb(253, 252, 250)"
        page.goto(stage.url + "/status")
        assert page.evaluate(ground) == "rgb(253, 252, 250)"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 360)])
def test_the_chat_page_passes_the_audit(browser: Any, stage: Stage, scheme: str, width: int) -> None:
    size = {"width": width, "height": 800}
    # Without the page's policy, which keeps out the auditor too.
    for page in watched(browser, stage, "/", color_scheme=scheme, viewport=size, bypass_csp=True):
        audited(page)
        set_up(page, list=True)
        stage.pieces, stage.note = [MARKDOWN], "a note"
        ask(page, "Everything")
        set_up(page, logprobs=True)
        page.locator("#conversations .title").wait_for(state="attached")
        page.evaluate("document.querySelector('#conversations .title').click()")
        stage.pieces, stage.prompt_tokens = [f"{index} " for index in range(8)], 1
        expect(ask(page, "Tokens", 2).locator(".aside")).to_be_visible()
        stage.refusal, stage.code = (400, "too long"), "context_length_exceeded"
        ask(page, "Refused", 3)
        page.locator(".tokens [role=option]").nth(2).hover()
        audited(page)
        for shortcut in ("Alt+,", "Control+/"):
            page.keyboard.press(shortcut)
            audited(page)
            page.keyboard.press("Escape")

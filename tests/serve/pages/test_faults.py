"""What the chat page does when something goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.pages.stage import MODEL, Stage
from tests.serve.pages.watching import answers, ask, expect, finished, say, set_up

pytestmark = pytest.mark.slow  # a browser takes a second for each


def test_a_refusal_is_shown_plainly_and_can_be_tried_again(chat: Any, stage: Stage) -> None:
    stage.refusal = (429, "256 answers wait already; ask again later")
    answer = ask(chat, "Busy?")
    expect(answer.get_by_role("alert")).to_contain_text(
        "256 answers wait already; ask again later. Try again in 7 s."
    )
    expect(answer.get_by_role("button")).to_have_text(["Try again"])
    stage.refusal = None
    answer.get_by_role("button", name="Try again").click()
    expect(answers(chat).locator(".prose")).to_have_text("All is well.")


def test_how_long_to_wait_is_said_once(chat: Any, stage: Stage) -> None:
    stage.refusal = (429, "the server is busy; try again in 7 seconds")
    expect(ask(chat, "Busy?").locator(".fault p")).to_have_text("The server is busy; try again in 7 seconds.")


def test_a_conversation_that_is_too_long_gives_way_to_a_new_one(chat: Any, stage: Stage) -> None:
    set_up(chat, overflow="refuse")
    stage.refusal, stage.code = (400, "too long"), "context_length_exceeded"
    answer = ask(chat, "On and on")
    assert stage.requests[-1]["overflow"] == "refuse"
    expect(answer.get_by_role("button")).to_have_text(["Start a new conversation", "Try again"])
    chat.reload()
    chat.locator("#conversations .title").click()
    stage.refusal = None
    answers(chat).get_by_role("button", name="Start a new conversation").click()
    ask(chat, "Anew")
    assert stage.messages == [{"role": "user", "content": "Anew"}]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("cut", "The connection broke; what came of the answer is kept."),
        ("short", "The stream ended before the answer did."),
        ("error", "The engine has failed."),
    ],
)
def test_a_stream_that_breaks_keeps_its_text_and_offers_another(
    chat: Any, stage: Stage, end: str, words: str
) -> None:
    stage.end, stage.hold = end, 3  # browsers drop what was not read yet when a connection breaks
    say(chat, "And?")
    expect(answers(chat).locator(".prose")).to_have_text("All is well.")
    stage.go.set()
    answer = finished(chat)
    expect(answer.get_by_role("alert")).to_contain_text(words)
    expect(answer.locator(".prose")).to_have_text("All is well.")
    stage.end = "done"
    answer.get_by_role("button", name="Try again").click()
    expect(chat.locator(".versions")).to_contain_text("2 / 2")
    expect(answers(chat).locator(".fault")).to_have_count(0)


def test_an_answer_that_never_came_is_left_out_of_the_next_question(chat: Any, stage: Stage) -> None:
    stage.refusal = (503, "draining")
    ask(chat, "One")
    stage.refusal = None
    ask(chat, "Two", 2)
    assert stage.messages == [{"role": "user", "content": "One\n\nTwo"}]


def test_an_answer_is_kept_when_the_page_is_closed_in_its_midst(chat: Any, stage: Stage) -> None:
    stage.pieces, stage.pause = ["on "] * 500, 0.02
    say(chat, "And on")
    expect(answers(chat).locator(".body")).to_contain_text("on on on")
    chat.reload()
    chat.locator("#conversations .title").click()
    expect(answers(chat).get_by_role("alert")).to_contain_text(
        "The page was closed while this answer was written."
    )


def test_a_key_is_asked_for_and_forgotten_with_the_tab(chat: Any, stage: Stage) -> None:
    stage.key = "secret"
    chat.reload()
    dialog = chat.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    expect(chat.locator("#model")).to_have_text("An API key is needed")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    chat.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("none of them")
    dialog.get_by_label("Key", exact=True).fill("secret")
    chat.keyboard.press("Enter")
    expect(chat.locator("#model")).to_contain_text(MODEL)
    ask(chat, "Hello")
    assert chat.evaluate("[sessionStorage['puna.key'], localStorage['puna.key']]") == ["secret", None]
    other = chat.context.new_page()
    other.goto(stage.url)
    expect(other.get_by_role("dialog", name="API key")).to_be_visible()
    other.get_by_label("Key", exact=True).fill("secret")
    other.get_by_label("Remember on this device").check()
    other.get_by_role("button", name="Use this key").click()
    expect(other.locator("#model")).to_contain_text(MODEL)
    assert other.evaluate("[sessionStorage['puna.key'] ?? null, localStorage['puna.key']]") == [
        None,
        "secret",
    ]


def test_without_a_key_the_page_says_so_and_asks_again_later(chat: Any, stage: Stage) -> None:
    stage.key = "secret"
    chat.reload()
    chat.get_by_role("button", name="Not now").click()
    expect(chat.locator("#notes")).to_contain_text("only with an API key")
    expect(chat.locator("#model")).to_have_text("An API key is needed")
    say(chat, "Hello")
    chat.get_by_label("Key", exact=True).fill("secret")
    chat.keyboard.press("Enter")
    expect(finished(chat).locator(".prose")).to_have_text("All is well.")


def test_a_note_of_the_server_is_shown_once(chat: Any, stage: Stage) -> None:
    stage.note = "this model has no chat template"
    ask(chat, "Hello")
    expect(chat.locator("#notes")).to_contain_text("This model has no chat template.")
    chat.get_by_label("Dismiss this note").click()
    ask(chat, "Again", 2)
    expect(chat.locator("#notes")).to_be_empty()

"""What the browser keeps, and files of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.pages.stage import MODEL, Stage
from tests.serve.pages.watching import answers, ask, expect, imported, set_up

pytestmark = pytest.mark.slow  # a browser takes a second for each


def test_conversations_are_kept_renamed_and_deleted(chat: Any) -> None:
    ask(chat, "About llamas")
    chat.get_by_role("button", name="New conversation").click()
    ask(chat, "About guanacos")
    chat.reload()
    titles = chat.locator("#conversations .title")
    expect(titles).to_have_text(["About guanacos", "About llamas"])
    titles.nth(1).click()
    expect(answers(chat).locator(".prose")).to_have_text("All is well.")
    chat.get_by_label("Rename “About llamas”").click()
    chat.keyboard.type("Wool")
    chat.keyboard.press("Enter")
    expect(chat.locator("#title")).to_have_text("Wool")
    chat.get_by_label("Delete “Wool”").click()
    chat.get_by_role("button", name="Delete", exact=True).click()
    expect(titles).to_have_text(["About guanacos"])
    expect(answers(chat)).to_have_count(0)
    chat.reload()
    expect(titles).to_have_text(["About guanacos"])


def test_another_tab_shows_the_same_list(chat: Any, stage: Stage) -> None:
    other = chat.context.new_page()
    other.goto(stage.url)
    expect(other.locator("#model")).to_contain_text(MODEL)
    ask(chat, "From the first tab")
    expect(other.locator("#conversations .title")).to_have_text(["From the first tab"])


def test_an_export_can_be_read_and_imported(chat: Any, stage: Stage, tmp_path: Path) -> None:
    set_up(chat, logprobs=True)
    ask(chat, "To be kept: ünïcödé")
    files = {}
    for name in ("As Markdown", "As JSON"):
        chat.get_by_label("Export this conversation").click()
        with chat.expect_download() as coming:
            chat.get_by_role("button", name=name).click()
        files[coming.value.suggested_filename] = Path(coming.value.path()).read_text("utf-8")
    assert files["to-be-kept-unicode.md"] == (
        f"# To be kept: ünïcödé\n\n## You\n\nTo be kept: ünïcödé\n\n## {MODEL}\n\nAll is well.\n"
    )
    written = json.loads(files["to-be-kept-unicode.json"])
    user, answer = written["conversations"][0]["messages"]
    assert (user["role"], answer["content"], answer["parent"]) == ("user", "All is well.", user["id"])
    assert answer["request"] == {
        "temperature": 0.7,
        "top_p": 0.95,
        "overflow": "truncate",
        "logprobs": True,
        "top_logprobs": 5,
        "system": "",
    }
    shown = answers(chat).inner_html()
    imported(chat, written)
    expect(chat.locator("#conversations .title")).to_have_count(2)
    expect(chat.get_by_text("1 conversation imported.")).to_be_visible()
    assert answers(chat).inner_html() == shown


def test_messages_of_the_api_can_be_imported(chat: Any, stage: Stage) -> None:
    imported(chat, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "**Hello**"}])
    expect(answers(chat).locator("strong")).to_have_text("Hello")
    ask(chat, "Go on", 2)
    assert [message["content"] for message in stage.messages] == ["Hi", "**Hello**", "Go on"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is not JSON"),
        ("{}", "it holds no conversations"),
        ('{"conversations": []}', "it holds no conversation"),
        ('[{"role": "tool", "content": "x"}]', "a message in it is not one of a user or an assistant"),
        ('{"conversations": [{"messages": [{"parent": "b", "role": "user", "content": "x"}]}]}', "before"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(chat: Any, text: str, reason: str) -> None:
    file = {"name": "some.json", "mimeType": "application/json", "buffer": text.encode()}
    chat.locator("#file").set_input_files(file)
    expect(chat.locator("[data-note=import]")).to_contain_text(reason)
    expect(chat.locator("#conversations .title")).to_have_count(0)

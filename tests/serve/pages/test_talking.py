"""Messages and answers, settings, and how likely each token was."""

from __future__ import annotations

import re
import time
from typing import Any

from tests.serve.pages.stage import MODEL, Stage
from tests.serve.pages.watching import answers, ask, expect, finished, say, set_up, watched
from tests.serve.running import Running


def test_an_answer_streams_and_is_counted(chat: Any, stage: Stage) -> None:
    stage.pieces, stage.hold = ["Up ", "on the ", "*high* ", "plain."], 3
    say(chat, "Where?")
    expect(answers(chat).locator(".prose")).to_have_text("Up on the high")
    expect(answers(chat)).to_have_attribute("aria-busy", "true")
    expect(answers(chat).locator(".stats")).to_contain_text("≈ 3 tokens")
    expect(chat.get_by_label("Stop", exact=True)).to_be_visible()
    stage.go.set()
    answer = finished(chat)
    assert answer.locator(".part").inner_html() == '<p dir="auto">Up on the <em>high</em> plain.</p>'
    expect(answer.locator(".stats")).to_contain_text(re.compile(r"^4 tokens · "))
    assert stage.requests == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Where?"}],
            "temperature": 0.7,
            "top_p": 0.95,
            "overflow": "truncate",
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    expect(chat.locator("#title")).to_have_text("Where?")


def test_the_rate_is_that_of_the_tokens_after_the_first(chat: Any, stage: Stage) -> None:
    stage.pieces, stage.pause = ["one "] * 6, 0.1
    stats = ask(chat, "Slowly").locator(".stats").inner_text()
    count, rate, first = re.fullmatch(
        r"(\d+) tokens · ([\d.]+) tokens/s · first after ([\d.]+) s", stats
    ).groups()
    assert int(count) == 6 and 5 < float(rate) < 11 and 0.1 <= float(first) < 0.5


def test_the_conversation_goes_along_with_each_message(chat: Any, stage: Stage) -> None:
    ask(chat, "One")
    ask(chat, "Two", 2)
    assert [message["content"] for message in stage.messages] == ["One", "All is well.", "Two"]


def test_stopping_keeps_what_came_and_frees_the_server(chat: Any, stage: Stage) -> None:
    stage.pieces, stage.pause = ["again and "] * 500, 0.02
    say(chat, "On and on")
    expect(answers(chat).locator(".body")).to_contain_text("again and again")
    chat.get_by_label("Stop", exact=True).click()
    answer = finished(chat)
    assert stage.gone.wait(2)
    expect(answer.locator(".stats")).to_contain_text("stopped")
    expect(answer.locator(".stats")).to_contain_text("≈")
    assert answer.locator(".body").inner_text().startswith("again and again")
    expect(chat.get_by_label("Send", exact=True)).to_be_visible()


def test_answering_again_keeps_both_answers(chat: Any, stage: Stage) -> None:
    ask(chat, "Say something")
    stage.pieces = ["Something else."]
    chat.get_by_label("Answer again").click()
    expect(answers(chat).locator(".prose")).to_have_text("Something else.")
    assert [message["content"] for message in stage.messages] == ["Say something"]
    expect(chat.locator(".versions")).to_contain_text("2 / 2")
    chat.get_by_label("Previous version").click()
    expect(answers(chat).locator(".prose")).to_have_text("All is well.")
    ask(chat, "Go on", 2)
    assert [message["content"] for message in stage.messages] == ["Say something", "All is well.", "Go on"]


def test_an_edited_message_goes_on_from_there(chat: Any, stage: Stage) -> None:
    ask(chat, "First")
    ask(chat, "Second", 2)
    chat.locator("article[data-role=user]").first.hover()
    chat.get_by_label("Edit your message").first.click()
    chat.locator(".editing textarea").fill("Other")
    chat.keyboard.press("Enter")
    finished(chat, 1)
    assert [message["content"] for message in stage.messages] == ["Other"]
    chat.get_by_label("Previous version").click()
    expect(answers(chat)).to_have_count(2)  # nothing that was said is lost
    expect(chat.locator("article[data-role=user] .body").last).to_have_text("Second")


def test_settings_are_sent_and_kept(chat: Any, stage: Stage) -> None:
    chat.get_by_role("button", name="Settings").click()
    for name, value in {"system": "Be brief.", "top_k": "40", "max_tokens": "12", "seed": "7"}.items():
        chat.locator(f"[name={name}]").fill(value)
    for name, value in {"temperature": "0", "top_p": "0.5"}.items():
        chat.locator(f"[name={name}]").fill(value)
    chat.get_by_label("When the conversation is too long").select_option("Let it slide")
    chat.get_by_role("button", name="Done").click()
    chat.reload()
    ask(chat, "Hello")
    sent = stage.requests[-1]
    expected = {"temperature": 0, "top_p": 0.5, "top_k": 40, "max_tokens": 12, "seed": 7}
    expected |= {"overflow": "slide"}
    assert {name: sent[name] for name in expected} == expected and "logprobs" not in sent
    assert stage.messages[0] == {"role": "system", "content": "Be brief."}
    chat.get_by_role("button", name="Settings").click()
    chat.get_by_role("button", name="Defaults").click()
    expect(chat.locator("[name=top_k]")).to_have_value("")
    expect(chat.locator("[name=temperature]")).to_have_value("0.7")
    expect(chat.locator("[name=overflow]")).to_have_value("truncate")


def test_the_token_limit_is_told(chat: Any, stage: Stage) -> None:
    stage.finish_reason = "length"
    expect(ask(chat, "More").locator(".stats")).to_contain_text("cut off at the token limit")


def test_an_answer_says_that_the_beginning_was_left_out(chat: Any, stage: Stage) -> None:
    stage.pieces = ["Well."]
    for count, (tokens, told) in enumerate([(40, False), (41, False), (30, True), (30, True), (42, False)]):
        stage.prompt_tokens = tokens
        expect(ask(chat, "And?", count + 1).locator(".aside")).to_be_visible(visible=told)
    expect(chat.locator("#spoken")).to_contain_text("its oldest part was left out")
    chat.reload()
    chat.locator("#conversations .title").click()
    expect(chat.locator(".aside:visible")).to_have_count(2)


def test_a_prompt_shorter_for_another_reason_lacks_nothing(chat: Any, stage: Stage) -> None:
    set_up(chat, system="Be brief.")
    stage.prompt_tokens = 40
    ask(chat, "One")
    set_up(chat, system="")
    chat.locator("#conversations .title").click()
    stage.prompt_tokens = 39
    expect(ask(chat, "Two", 2).locator(".aside")).to_be_hidden()  # the system message is gone
    stage.prompt_tokens = 38
    chat.get_by_label("Answer again", exact=True).click()
    expect(finished(chat, 2).locator(".aside")).to_be_hidden()  # what it answered before is no part of it


def test_an_answer_that_slid_says_so(chat: Any, stage: Stage) -> None:
    stage.context, stage.prompt_tokens = 40, 37
    set_up(chat, overflow="slide")
    expect(ask(chat, "Fits").locator(".aside")).to_be_hidden()  # with three tokens of an answer
    stage.prompt_tokens = 38
    expect(ask(chat, "Slides", 2).locator(".aside")).to_be_visible()


def test_every_token_tells_its_probability(chat: Any, stage: Stage) -> None:
    set_up(chat, logprobs=True)
    stage.pieces = ["Lla", "mas", "\n\n", " hum", "."]
    answer = ask(chat, "What do they do?")
    assert stage.requests[-1]["logprobs"] is True and stage.requests[-1]["top_logprobs"] == 5
    tokens = answer.locator(".tokens [role=option]")
    assert tokens.all_inner_texts() == ["Lla", "mas", "↵↵", " hum", "."]
    classes = tokens.evaluate_all("all => all.map(token => token.className)")
    assert classes == ["l0", "l1", "l1", "l1", "l2"]  # 97, 84, 71, 58 and 45%
    assert answer.locator(".legend li").count() == 6
    tokens.nth(3).hover()
    tip = chat.get_by_role("tooltip")
    expect(tip).to_contain_text("58.0% · log -0.545")
    assert [row.split() for row in tip.locator("tr").all_inner_texts()] == [
        ["␣hum", "58.0%"],
        ["llama", "25.2%"],
        ["␣alpaca", "12.6%"],
    ]
    expect(answer.locator(".stats")).to_contain_text("perplexity 1.46")  # exp of the mean of -log p
    chat.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    answer.get_by_role("button", name="Tokens").click()
    expect(answer.locator(".prose p")).to_have_text(["Llamas", "hum."])


def test_the_keyboard_walks_over_tokens(chat: Any, stage: Stage) -> None:
    set_up(chat, logprobs=True)
    ask(chat, "Well?")
    chat.keyboard.press("Alt+p")
    tip = chat.get_by_role("tooltip")
    expect(tip).to_contain_text("All␣ 97.0%")
    chat.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("is␣ 84.0%")
    active = chat.locator(".tokens").get_attribute("aria-activedescendant")
    expect(chat.locator(f"#{active}")).to_have_attribute(
        "aria-label", re.compile(r"^is , 84.0%; likeliest: is ")
    )
    chat.keyboard.press("End")
    expect(tip).to_contain_text("well. 71.0%")
    chat.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_the_page_talks_to_the_server(browser: Any, server: Running) -> None:
    for page in watched(browser, Stage(url=server.url), "/"):
        set_up(page, seed=3, max_tokens=20, logprobs=True, temperature=1, top_p=1)
        answer = ask(page, "Hello")
        body = {
            "messages": [{"role": "user", "content": "Hello"}],
            "seed": 3,
            "max_tokens": 20,
            "logprobs": True,
        }
        said = server.post("/v1/chat/completions", body).json()
        listed = said["choices"][0]["logprobs"]["content"]
        expect(answer.locator(".tokens [role=option]")).to_have_count(len(listed))
        expect(answer.locator(".stats")).to_contain_text(f"{said['usage']['completion_tokens']} tokens")
        answer.get_by_role("button", name="Tokens").click()
        shown = answer.locator(".prose").inner_text().split()
        assert "".join(shown)[:5] == "".join(said["choices"][0]["message"]["content"].split())[:5]


def test_a_conversation_may_outgrow_the_context(browser: Any, server: Running) -> None:
    for page in watched(browser, Stage(url=server.url), "/"):
        set_up(page, max_tokens=4)
        text = " ".join(["parser"] * 30)  # 512 tokens hold some of them
        told = [ask(page, text, count + 1).locator(".aside").is_visible() for count in range(6)]
        assert told == sorted(told) and told[0] < told[-1]
        expect(page.locator(".fault")).to_have_count(0)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("When the conversation is too long").select_option("Stop and say so")
        page.get_by_role("button", name="Done").click()
        expect(ask(page, text, 7).get_by_role("button", name="Start a new conversation")).to_be_visible()


def test_stopping_frees_the_server_at_once(browser: Any, server: Running) -> None:
    for page in watched(browser, Stage(url=server.url), "/"):
        set_up(page, temperature=1, top_p=1)
        say(page, "Hello")
        page.keyboard.press("Escape")
        expect(answers(page)).to_have_attribute("aria-busy", "false")
        deadline = time.monotonic() + 2
        while server.state.worker.unfinished and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.state.worker.unfinished == 0

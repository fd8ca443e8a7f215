"""Conversations: what the model is shown, what the commands change, and what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.errors import InputError, TokenizerError
from puna.recipes.answering.chat import chat
from puna.recipes.answering.options import seed_of
from puna.recipes.answering.terminal import line_reader, read_message

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
SAMPLING: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.9, "seed": 4}


@pytest.fixture(scope="module")
def llm(finished: tuple[Path, dict[str, Any]]) -> LLM:
    return puna.load(finished[0], device="cpu", dtype="float32")


class Talk:
    """A conversation with everything typed beforehand."""

    def __init__(self, llm: LLM, typed: list[str | type[BaseException]], **options: Any) -> None:
        self.answers, self.notes = list[str](), list[str]()
        self._answer = ""
        self._typed: Iterator[str | type[BaseException]] = iter(typed)
        wanted = {"system": None, "template": TEMPLATE, "start": None, "sampling": SAMPLING, **options}
        sampling = dict(wanted.pop("sampling"))
        chat(llm, sampling, read=self._read, write=self._write, note=self._note, **wanted)

    @property
    def remarks(self) -> list[str]:
        """Without the figures of answers."""
        return [note for note in self.notes if " s]" not in note]

    def _read(self, prompt: str) -> str | None:
        typed = next(self._typed, None)
        if isinstance(typed, type):
            raise typed
        return typed

    def _write(self, text: str) -> None:
        self._answer += text

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if text.endswith(" s]"):  # the figures of an answer, after the end of its last line
            self.answers.append(self._answer.removesuffix("\n"))
            self._answer = ""


def said(llm: LLM, messages: list[tuple[str, str]], answer: int, **changes: Any) -> str:
    """What the model says to these messages, as the conversation's answer of this number."""
    sampling = {**SAMPLING, **changes}
    return llm.chat(
        [{"role": role, "content": content} for role, content in messages],
        template=TEMPLATE,
        **{**sampling, "seed": seed_of(sampling["seed"], answer)},
    ).text


def test_each_answer_follows_everything_said_before(llm: LLM) -> None:
    talk = Talk(llm, ["the llama", "", "   ", "grass"], system="eat")
    first = said(llm, [("system", "eat"), ("user", "the llama")], 1)
    second = said(llm, [("system", "eat"), ("user", "the llama"), ("assistant", first), ("user", "grass")], 2)
    assert talk.answers == [first, second]
    assert talk.remarks == []
    assert len(talk.notes) == 2


def test_the_figures_tell_tokens_speed_and_the_wait(llm: LLM) -> None:
    [figures] = Talk(llm, ["the llama"], sampling={**SAMPLING, "ignore_eos": True}).notes
    assert figures.startswith("[cut at max_new_tokens; 8 tokens, ")
    words = figures.strip("[]").split()
    assert float(words[words.index("tokens/s,") - 1]) > 0
    assert figures.endswith(" s]")


def test_settings_change_between_answers(llm: LLM) -> None:
    typed: list[str | type[BaseException]] = ["/temperature 0", "grass", "/reset", "/set top_k=3"]
    typed += ["/set temperature 1.5", "grass", "/set top_k", "/reset", "grass", "/set"]
    talk = Talk(llm, typed)
    assert talk.answers == [
        said(llm, [("user", "grass")], 1, temperature=0),
        said(llm, [("user", "grass")], 2, temperature=1.5, top_k=3),
        said(llm, [("user", "grass")], 3, temperature=1.5),
    ]
    assert talk.remarks[-1] == "[max_new_tokens 8, temperature 1.5, seed 4]"


def test_a_setting_without_a_value_is_the_command_lines_again(llm: LLM) -> None:
    typed: list[str | type[BaseException]] = [
        "/set temperature 0",
        "/set temperature",
        "/set max_new_tokens 3",
    ]
    talk = Talk(llm, [*typed, "/set max_new_tokens", "/set top_k 5", "/set top_k"])
    assert (
        talk.remarks[1] == talk.remarks[3] == talk.remarks[5] == "[max_new_tokens 8, temperature 0.9, seed 4]"
    )


def test_where_the_context_ends_it_says_so(llm: LLM) -> None:
    """64 tokens; the message takes a few of them."""
    sampling = {**SAMPLING, "max_new_tokens": 200, "ignore_eos": True}
    [figures] = Talk(llm, ["grass"], sampling=sampling).notes
    assert figures.startswith("[cut where the context is full; ")


def test_only_a_person_is_greeted_and_after_what_can_fail(llm: LLM) -> None:
    assert Talk(llm, [], person=True).notes == ["[/help tells the commands; Ctrl-D ends]"]
    assert Talk(llm, [], person=False).notes == []
    notes: list[str] = []
    with pytest.raises(TokenizerError):
        chat(llm, SAMPLING, system=None, template=None, start=None, read=str, write=str, note=notes.append,
             person=True)  # fmt: skip
    assert notes == []


@pytest.mark.parametrize(
    ("options", "typed", "code", "message"),
    [
        ([], "grass\n" + "the llama " * 60 + "\nwind\n", 2, "puna: 1 message could not be answered"),
        ([], "grass\n/frobnicate\n", 0, None),
        (["--set", "n=2"], "grass\n", 2, "puna: n and best_of must be 1 in a conversation"),
    ],
)
def test_piped_messages_and_the_exit_code(
    finished: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    typed: str,
    code: int,
    message: str | None,
) -> None:
    from puna import cli

    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    given = ["--template", TEMPLATE, "--device", "cpu", "--max-new-tokens", "4", *options]
    monkeypatch.setattr(sys, "argv", ["puna", "chat", str(finished[0]), *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    err = capsys.readouterr().err
    assert "/help tells" not in err
    if message is not None:
        assert err.splitlines()[-1].startswith(message)


def test_commands_at_fault_change_nothing(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    typed = {
        "/frobnicate": "no command /frobnicate. /help lists them",
        "/rest": "no command /rest. Did you mean '/reset'?",
        "/": "no command /.",
        "/set temprature 1": "Did you mean 'temperature'?",
        "/set temprature": "Did you mean 'temperature'?",
        "/set top_p=2": "'top_p'",
        "/set zzzz": "unknown setting 'zzzz'. Settings here: max_new_tokens, ",
        "/set n 2": "n and best_of must be 1 in a conversation",
        "/set best_of=3": "n and best_of must be 1 in a conversation",
        "/set engine.cache_dtype int8": "--set engine.KEY=VALUE",
        "/set engine.cache_dtype=int8": "--set engine.KEY=VALUE",
        "/temperature warm": "'temperature'",
        "/retry": "nothing was said yet",
        "/save": "name a file: /save FILE",
        f"/save {tmp_path / 'there'}": "exists; choose another file",
        f"/save {tmp_path / 'no' / 'where'}": "No such file",
        "/load": "name a file: /load FILE",
        f"/load {tmp_path / 'nowhere'}": "cannot be read",
        f"/load {tmp_path / 'there'}": "not valid JSON",
    }
    talk = Talk(llm, [*typed, "grass"])
    assert talk.answers == [said(llm, [("user", "grass")], 1)]
    for note, (line, message) in zip(talk.remarks, typed.items(), strict=True):
        assert message in note, line
        assert len(note.splitlines()) == 1
    assert (tmp_path / "there").read_text() == "mine"


def test_a_space_or_quotes_make_a_message_of_a_command(llm: LLM) -> None:
    for typed in ([" /exit"], ['"""', "/exit", '"""'], ['"""/exit"""']):
        assert Talk(llm, [*typed]).answers == [said(llm, [("user", " /exit")], 1)]


def test_help_names_every_command(llm: LLM) -> None:
    [text] = Talk(llm, ["/help"]).notes
    for name in ("help", "system", "temperature", "set", "reset", "retry", "save", "load", "exit"):
        assert f"/{name}" in text


def test_the_system_message_can_be_set_and_taken_back(llm: LLM) -> None:
    talk = Talk(llm, ["/system eat", "grass", "/system", "wind", "/system move", "/reset", "grass"])
    first = said(llm, [("system", "eat"), ("user", "grass")], 1)
    second = said(llm, [("user", "grass"), ("assistant", first), ("user", "wind")], 2)
    assert talk.answers == [first, second, said(llm, [("system", "move"), ("user", "grass")], 3)]


def test_retry_answers_once_more(llm: LLM) -> None:
    talk = Talk(llm, ["grass", "/retry", "wind"])
    first, again = said(llm, [("user", "grass")], 1), said(llm, [("user", "grass")], 2)
    assert first != again
    third = said(llm, [("user", "grass"), ("assistant", again), ("user", "wind")], 3)
    assert talk.answers == [first, again, third]
    assert "the same again" in "".join(Talk(llm, ["/temperature 0", "grass", "/retry"]).remarks)


def test_a_conversation_is_kept_and_gone_on_with(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk = Talk(
        llm, ["grass", f"/save {path}", "/reset", f"/load {path}", "wind", f"/save {path}", "/exit", "x"]
    )
    first = said(llm, [("user", "grass")], 1)
    exchange = [("user", "grass"), ("assistant", first), ("user", "wind")]
    assert talk.answers == [first, said(llm, exchange, 2)]
    kept = json.loads(path.read_text())
    assert [message["content"] for message in kept["messages"]] == ["grass", first, "wind", talk.answers[1]]

    kept["messages"] = kept["messages"][:3]
    path.write_text(json.dumps(kept))
    more = Talk(llm, ["/retry"], start=path)
    assert more.answers == [said(llm, exchange, 1)]
    assert "waits for its answer: /retry" in more.remarks[0]
    told = Talk(llm, ["/retry"], start=path, system="eat")
    assert told.answers == [said(llm, [("system", "eat"), *exchange], 1)]


@pytest.mark.parametrize(
    "messages", [3, [3], [{"role": "user", "content": 3}], [{"role": "x", "content": ""}], None]
)
def test_a_file_that_holds_no_conversation(llm: LLM, tmp_path: Path, messages: Any) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"messages": messages}))
    with pytest.raises(InputError, match="holds no conversation"):
        Talk(llm, [], start=tmp_path / "f.json")


def test_what_outgrows_the_context_is_forgotten_from_its_beginning(llm: LLM) -> None:
    """64 tokens: a few exchanges fit."""
    typed: list[str | type[BaseException]] = [f"the llama {number}" for number in range(8)]
    talk = Talk(llm, typed, system="eat", sampling={**SAMPLING, "ignore_eos": True})
    assert len(talk.answers) == 8
    exchanges = [
        [("user", asked), ("assistant", answer)] for asked, answer in zip(typed, talk.answers, strict=True)
    ]
    forgotten = 0
    for number, answer in enumerate(talk.answers):
        candidates = []
        for first in range(forgotten, number + 1):
            before = [message for exchange in exchanges[first:number] for message in exchange]
            messages = [("system", "eat"), *before, ("user", str(typed[number]))]
            length = len(llm.tokenizer.encode("".join(f"{r[0]}:{c}\n" for r, c in messages)))  # type: ignore[union-attr]
            candidates.append((length + 8 <= llm.context, first, messages))
        _, forgotten, messages = next(candidate for candidate in candidates if candidate[0])
        assert answer == said(llm, messages, number + 1, ignore_eos=True)
    assert forgotten > 2
    assert talk.remarks[-1] == (
        "[the conversation outgrew the 64 tokens that this model takes: from here on it does not see the "
        f"first {forgotten} exchanges; the system message stays]"
    )
    assert any("does not see the first exchange;" in remark for remark in talk.remarks)


def test_a_message_too_long_is_unsaid(llm: LLM) -> None:
    talk = Talk(llm, ["grass", "the llama " * 60, "wind"])
    first = said(llm, [("user", "grass")], 1)
    # It took a number of its own: the third answer has the third seed.
    third = said(llm, [("user", "grass"), ("assistant", first), ("user", "wind")], 3)
    assert talk.answers == [first, third]
    assert "tokens; this model takes 64" in talk.remarks[0]
    assert talk.remarks[1:] == ["[your message counts as unsaid]"]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = {**SAMPLING, "max_new_tokens": 30, "ignore_eos": True}
    whole = said(llm, [("user", "grass")], 1, max_new_tokens=30, ignore_eos=True)
    write, pieces = Talk._write, list[str]()

    def interrupted(talk: Talk, text: str) -> None:
        write(talk, text)
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Talk, "_write", interrupted)
    before = signal.getsignal(signal.SIGINT)
    talk = Talk(llm, ["grass", "wind"], sampling=sampling)
    first, second = talk.answers
    assert whole.startswith(first)
    assert first == "".join(pieces[:3])
    assert "[stopped; " in talk.notes[0]
    exchange = [("user", "grass"), ("assistant", first), ("user", "wind")]
    assert second == said(llm, exchange, 2, max_new_tokens=30, ignore_eos=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert (llm.engine.load.running, llm.engine.load.waiting) == (0, 0)


def test_ctrl_c_before_the_first_word_unsays_the_message(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a prompt that takes many steps: the step at hand is the last."""
    slow = LLM(llm.model, llm.tokenizer, engine=EngineSettings(step_tokens=4, max_running=1))
    step, steps = slow.engine.step, list[int]()

    def interrupted() -> bool:
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(slow.engine, "step", interrupted)
    talk = Talk(slow, ["grass and slow small clouds", "/exit"])
    assert len(steps) == 2
    assert talk.answers == []
    assert talk.notes == ["[stopped before the first token]", "[your message counts as unsaid]"]
    assert Talk(slow, ["wind"]).answers == [said(llm, [("user", "wind")], 1)]


def test_ctrl_c_where_one_types_is_taken_at_its_second(llm: LLM) -> None:
    talk = Talk(llm, ["grass", KeyboardInterrupt, "wind"])
    assert len(talk.answers) == 2
    assert "Ctrl-C once more" in "".join(talk.remarks)
    with pytest.raises(KeyboardInterrupt):
        Talk(llm, [KeyboardInterrupt, KeyboardInterrupt])


def test_ctrl_c_in_a_message_only_clears_it(llm: LLM) -> None:
    """And it is no second one: what was typed between the two counts."""
    typed: list[str | type[BaseException]] = [KeyboardInterrupt, '"""a', "b", KeyboardInterrupt, "grass"]
    assert Talk(llm, typed).answers == [said(llm, [("user", "grass")], 1)]
    with pytest.raises(KeyboardInterrupt):
        Talk(llm, ['"""a', KeyboardInterrupt, KeyboardInterrupt, KeyboardInterrupt])


def test_without_a_template_it_says_so_before_anyone_types(llm: LLM) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        Talk(llm, ["never read"], template=None)
    with pytest.raises(InputError, match="no tokenizer"):
        Talk(LLM(llm.model), ["never read"])


MESSAGES: list[tuple[list[str], list[str | None]]] = [
    (["one", "two"], ["one", "two"]),
    (['"""', "one", "", "two", '"""', "three"], ["one\n\ntwo", "three"]),
    (['"""one', 'two"""'], ["one\ntwo"]),
    (['"""one"""'], ["one"]),
    (['"""', "never closed"], ["\nnever closed"]),
    (['"""'], [""]),
]


@pytest.mark.parametrize(("lines", "messages"), MESSAGES)
def test_messages_of_several_lines(lines: list[str], messages: list[str | None]) -> None:
    typed = iter(lines)
    for message in messages:
        assert (read_message(lambda prompt: next(typed, None)) or "").strip("\n") == (message or "").strip(
            "\n"
        )
    assert read_message(lambda prompt: next(typed, None)) is None


def test_piped_input_shows_no_prompt(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\n\ntwo"))
    read = line_reader()
    assert [read("you> ") for _ in range(4)] == ["one", "", "two", None]
    assert capfd.readouterr() == ("", "")


def test_a_terminal_takes_what_is_pasted_as_one_message() -> None:
    """Behind a terminal of our own: bracketed paste, Ctrl-D, and the remarks dimmed."""
    pytest.importorskip("readline")
    program = "while (line := read('you> ')) is not None: note(repr(line))\n"
    child, terminal = _behind_a_terminal(program)
    os.write(terminal, b"\x1b[200~one\ntwo\x1b[201~\n")
    shown = _wait_for(terminal, lambda shown: b"'" in shown and b"you> " in shown)
    assert b"\x1b[2m'one\\ntwo'\x1b[22m" in shown
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)


def _behind_a_terminal(loop: str) -> tuple[int, int]:
    """A process that reads lines in a loop, at its prompt, and the terminal it has."""
    program = f"from puna.recipes.answering.terminal import line_reader, note\nread = line_reader()\n{loop}"
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", program])
    _wait_for(terminal, lambda shown: b"you> " in shown)
    return child, terminal


def _wait_for(terminal: int, enough: Callable[[bytes], bool], seconds: float = 30) -> bytes:
    shown, until = b"", time.monotonic() + seconds
    while not enough(shown):
        assert time.monotonic() < until, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096)
    return shown


def test_ctrl_c_in_a_line_clears_it_and_in_an_empty_one_is_raised() -> None:
    """Behind a terminal of our own."""
    pytest.importorskip("readline")
    program = (
        "while True:\n    try: note(repr(read('you> ')))\n    except KeyboardInterrupt: note('raised')\n"
    )
    child, terminal = _behind_a_terminal(program)
    for typed, answered in [
        (b"one\n", rb"'one'.*you> $"),
        (b"\x03", rb"raised.*you> $"),
        (b"half", rb"half$"),
        (b"\x03", rb"''.*you> $"),
        (b"\x03", rb"raised.*you> $"),
    ]:
        time.sleep(0.2)  # Python overlooks a signal between the prompt and its waiting for keys
        os.write(terminal, typed)
        pattern = re.compile(answered, re.DOTALL)
        _wait_for(terminal, lambda shown, pattern=pattern: bool(pattern.search(shown)))  # type: ignore[misc]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(terminal)

"""Stop strings cut exactly, wherever token boundaries fall, and nothing is shown that is cut later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.engine.text import AnswerText, answer_text
from puna.tokenizer.tokenizer import Tokenizer


class Pieces:
    """A decoder whose tokens are texts by number; `rest` is what only comes out at the end."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces, self._rest = pieces, rest

    def push(self, index: int) -> str:
        return self._pieces[index]

    def flush(self) -> str:
        rest, self._rest = self._rest, ""
        return rest


def shown(pieces: list[str], stop: list[str], rest: str = "") -> tuple[list[str], bool]:
    """What comes out token by token, and whether a stop string ended it."""
    text = AnswerText(Pieces(pieces, rest), len(pieces), stop)
    out = []
    for token in range(len(pieces)):
        out.append(text.push(token))
        if text.stopped:
            break
    return [*out, text.close()], text.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "stopped"),
    [
        (["ab", "cd"], [], "abcd", False),
        (["ab", "cd"], ["bc"], "a", True),
        (["ab", "cd"], ["d"], "abc", True),
        (["a", "a", "b"], ["ab"], "a", True),
        (["ab", "ab", "ac"], ["abac"], "ab", True),
        (["abcabd"], ["abd", "c"], "ab", True),
        (["x\n", "\n", "y"], ["\n\n"], "x", True),
        (["stop"], ["stop"], "", True),
        (["sto", "p"], ["stop", "to"], "s", True),
        (["sto"], ["stop"], "sto", False),
    ],
)
def test_cut_exactly(pieces: list[str], stop: list[str], expected: str, stopped: bool) -> None:
    out, ended = shown(pieces, stop)
    assert ("".join(out), ended) == (expected, stopped)


def test_a_stop_string_that_only_comes_out_at_the_end_is_found() -> None:
    assert shown(["a"], ["\ufffd"], rest="\ufffd") == (["a", ""], True)


def test_text_that_stops_nothing_is_neither_cut_nor_held_back() -> None:
    text = AnswerText(Pieces(["sto", "p", "sto", "p"]), 4, ["stop"])
    pieces = [text.push(token, stops=token > 0) for token in range(4)]
    assert pieces == ["sto", "p", "", ""]
    assert text.stopped
    at_the_end = AnswerText(Pieces(["a"], rest="\ufffd"), 1, ["\ufffd"])
    assert at_the_end.push(0, stops=False) + at_the_end.close() == "a\ufffd"
    assert not at_the_end.stopped


letters = st.text(alphabet="ab", max_size=4)


@given(st.lists(letters, max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_is_always_part_of_the_answer(pieces: list[str], stop: list[str]) -> None:
    out, stopped = shown(pieces, stop)
    # By definition: at the first token that completes any stop string, cut before the earliest.
    expected, ended = "", False
    for piece in pieces:
        expected += piece
        found = [expected.find(text) for text in stop if text in expected]
        if found:
            expected, ended = expected[: min(found)], True
            break
    assert ("".join(out), stopped) == (expected, ended)


@given(st.lists(letters, max_size=12), st.text(alphabet="ab", min_size=1, max_size=4))
def test_no_more_is_held_back_than_could_begin_the_stop_string(pieces: list[str], stop: str) -> None:
    out, stopped = shown(pieces, [stop])
    if not stopped:
        assert stop.startswith(out[-1])


def test_an_answer_continues_its_prompt_or_stands_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("self parser", bos=False)
    continued = answer_text(tokenizer, tokenizer.encode("def"), (), continues=True)
    alone = answer_text(tokenizer, tokenizer.encode("def"), (), continues=False)
    assert "".join([*map(continued.push, ids), continued.close()]) == " self parser"
    assert "".join([*map(alone.push, ids), alone.close()]) == "self parser"


def test_the_first_text_of_all_has_no_leading_space(tokenizer: Tokenizer) -> None:
    text = answer_text(tokenizer, [tokenizer.bos_id], (), continues=True)
    assert "".join(map(text.push, tokenizer.encode("self", bos=False))) == "self"


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: Tokenizer) -> None:
    text = answer_text(tokenizer, [tokenizer.vocab_size + 1], (), continues=True)
    assert text.push(tokenizer.vocab_size) == ""

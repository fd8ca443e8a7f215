"""What one answer is given and keeps: where it ends, what of a long prompt is used, what sliding leaves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.engine.params import SamplingParams
from puna.engine.sequence import Sequence
from puna.engine.text import AnswerText

END = 9


class Letters:
    """A decoder: every token is a letter, and `rest` comes out at the end."""

    def __init__(self, rest: str = "") -> None:
        self._rest = rest

    def push(self, token: int) -> str:
        return "abcdefghij"[token]

    def flush(self) -> str:
        rest, self._rest = self._rest, ""
        return rest


def sequence_of(
    prompt: list[int], context: int = 100, anchor: int = 0, rest: str = "", **params: Any
) -> Sequence:
    wanted = SamplingParams(**params)
    text = AnswerText(Letters(rest), 10, wanted.stop)
    return Sequence(prompt, wanted, [END], context, text, anchor=anchor)


def answer(sequence: Sequence, tokens: list[int]) -> tuple[str, str | None, int]:
    """Its text, why it ended, and after how many of the tokens."""
    pieces = []
    for token in tokens:
        pieces.append(sequence.push(token))
        if sequence.finish_reason is not None:
            break
    return "".join(pieces), sequence.finish_reason, len(sequence.tokens)


@pytest.mark.parametrize(
    ("params", "tokens", "expected"),
    [
        ({}, [0, 1, END, 2], ("ab", "stop", 3)),
        ({"ignore_eos": True, "max_new_tokens": 4}, [0, 1, END, 2], ("abjc", "length", 4)),
        ({"stop_ids": [1]}, [0, 1, 2], ("a", "stop", 2)),
        ({"stop_ids": 1, "ignore_eos": True}, [0, END, 1, 2], ("aj", "stop", 3)),
        ({"max_new_tokens": 2}, [0, 1, 2], ("ab", "length", 2)),
        ({"max_new_tokens": 2}, [0, END, 2], ("a", "stop", 2)),
        ({"stop": "bc"}, [0, 1, 2, 3], ("a", "stop", 3)),
        ({"stop": "bc", "max_new_tokens": 2}, [0, 1], ("ab", "length", 2)),
        ({"stop": "bc", "max_new_tokens": 3}, [0, 1, 2], ("a", "stop", 3)),
        ({"stop": "bc"}, [0, 1, END], ("ab", "stop", 3)),
        # The text of the first min_new_tokens is no part of any stop string.
        ({"stop": "b", "min_new_tokens": 2}, [0, 1, 0, 1], ("aba", "stop", 4)),
        ({"stop": "ab", "min_new_tokens": 1}, [0, 1, 0, 1], ("ab", "stop", 4)),
        ({"stop": "ab", "min_new_tokens": 2, "max_new_tokens": 3}, [0, 1, 0], ("aba", "length", 3)),
    ],
)
def test_where_an_answer_ends(params: dict[str, Any], tokens: list[int], expected: tuple) -> None:
    assert answer(sequence_of([1, 2], **params), tokens) == expected


def test_what_comes_out_only_at_the_end_may_stop_it_too() -> None:
    wanted = {"stop": "\ufffd", "max_new_tokens": 2}
    assert answer(sequence_of([1], rest="\ufffd", **wanted), [0, 1]) == ("ab", "stop", 2)
    held_to_it = sequence_of([1], rest="\ufffd", min_new_tokens=2, **wanted)
    assert answer(held_to_it, [0, 1]) == ("ab\ufffd", "length", 2)


def test_a_satisfied_constraint_ends_an_answer_with_all_its_text() -> None:
    sequence = sequence_of([1], stop="bcd")
    assert [sequence.push(0), sequence.push(1), sequence.push(2, complete=True)] == ["a", "", "bc"]
    assert sequence.finish_reason == "stop"
    last = sequence_of([1], max_new_tokens=1)
    assert (last.push(4, complete=True), last.finish_reason) == ("e", "stop")


def test_cancelling_shows_what_was_held_back_once() -> None:
    sequence = sequence_of([1], stop="bcd")
    assert [sequence.push(0), sequence.push(1)] == ["a", ""]
    assert (sequence.cancel(), sequence.finish_reason) == ("b", "cancelled")
    assert sequence.cancel() == ""
    ended = sequence_of([1])
    ended.push(END)
    assert (ended.cancel(), ended.finish_reason) == ("", "stop")


def test_without_a_tokenizer_there_is_no_text() -> None:
    sequence = Sequence([1, 2], SamplingParams(max_new_tokens=3), [END], 50, None)
    assert [sequence.push(token) for token in (3, 4, 5)] == ["", "", ""]
    assert (sequence.tokens, sequence.ids) == ([3, 4, 5], [1, 2, 3, 4, 5])
    assert sequence.finish_reason == "length"
    other = Sequence([1], SamplingParams(), [END], 50, None)
    assert (other.cancel(), other.finish_reason) == ("", "cancelled")


@pytest.mark.parametrize(
    ("overflow", "length", "most", "used", "limit", "longest"),
    [
        ("refuse", 7, 9, [*range(7)], 3, 10),
        ("refuse", 2, 5, [0, 1], 5, 7),
        ("truncate", 7, 3, [*range(7)], 3, 10),
        ("truncate", 8, 3, [0, 2, 3, 4, 5, 6, 7], 3, 10),
        ("truncate", 8, 9, [0, 4, 5, 6, 7], 5, 10),
        ("truncate", 30, 1, [0, *range(22, 30)], 1, 10),
        ("slide", 8, 3, [*range(8)], 3, 10),
        ("slide", 10, 900, [*range(10)], 900, 10),
        ("slide", 11, 900, [0, 7, 8, 9, 10], 900, 10),
        ("slide", 2, 3, [0, 1], 3, 5),
    ],
)
def test_what_is_used_of_a_prompt(
    overflow: str, length: int, most: int, used: list[int], limit: int, longest: int
) -> None:
    sequence = sequence_of([*range(length)], 10, 1, overflow=overflow, max_new_tokens=most)
    assert (list(sequence.prompt), sequence.dropped) == (used, length - len(used))
    assert (sequence.limit, sequence.longest) == (limit, longest)
    assert sequence.ids == used


def test_sliding_keeps_the_anchor_and_the_newest_half() -> None:
    sequence = sequence_of([0, 1, 2], 8, 1, overflow="slide", max_new_tokens=12, ignore_eos=True)
    lengths, slides = [], 0
    for token in range(12):
        sequence.push(token % 8)
        lengths.append(len(sequence.ids))
        if sequence.slid:
            assert sequence.ids == [0, *[answer % 8 for answer in range(token - 3, token + 1)]]
            sequence.slid, slides = False, slides + 1
    assert lengths == [4, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]
    assert slides == 2
    assert (sequence.prompt, sequence.tokens) == ((0, 1, 2), [token % 8 for token in range(12)])
    assert sequence.finish_reason == "length"


@given(
    length=st.integers(1, 40),
    context=st.integers(2, 20),
    anchor=st.integers(0, 30),
    most=st.integers(1, 60),
    overflow=st.sampled_from(["truncate", "slide"]),
)
def test_ids_stay_within_the_context(
    length: int, context: int, anchor: int, most: int, overflow: str
) -> None:
    prompt = [*range(length)]
    sequence = Sequence(
        prompt, SamplingParams(overflow=overflow, max_new_tokens=most), (), context, None, anchor=anchor
    )
    used = list(sequence.prompt)
    assert used == prompt[: len(used) - (newest := newest_run(used, length))] + prompt[length - newest :]
    if sequence.dropped and anchor:
        assert used[0] == 0 or context == 2
    assert sequence.limit >= min(most, context // 2)
    whole = list(used)
    while sequence.finish_reason is None:
        token = 100 + len(sequence.tokens)
        sequence.push(token)
        whole.append(token)
        assert len(sequence.ids) <= min(context, sequence.longest)
        assert sequence.ids[-1] == token
        kept = newest_run_of(sequence.ids, whole)
        assert kept >= min(len(whole), context // 2)
        assert sequence.ids == whole[: len(sequence.ids) - kept] + whole[len(whole) - kept :]
    assert len(sequence.tokens) == sequence.limit == (most if overflow == "slide" else sequence.limit)


def newest_run(used: list[int], length: int) -> int:
    return newest_run_of(used, [*range(length)])


def newest_run_of(ids: list[int], whole: list[int]) -> int:
    """How many of the last ids are the last of the whole."""
    pairs = zip(reversed(ids), reversed(whole), strict=False)
    return next((count for count, (one, other) in enumerate(pairs) if one != other), len(ids))


def test_only_one_that_wants_logits_of_its_prompt_computes_all_of_it() -> None:
    assert sequence_of([1]).shares
    assert not sequence_of([1], prompt_logprobs=0).shares

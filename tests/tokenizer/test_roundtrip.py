"""Every valid text survives; streams give what decoding gives; batches give what single calls give."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import TokenizerError
from puna.tokenizer.tokenizer import Tokenizer

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
TEXTS = st.text(CHARACTERS, max_size=40) | st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\t", "\0", "\r\n", "a", "7", "é", "日", "😀", "<s>", "</s>", "<|eot_id|>"]
    ),
    max_size=20,
).map("".join)
RELAXED = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@RELAXED
@given(text=TEXTS)
def test_every_text_survives(each: Tokenizer, text: str) -> None:
    assert each.decode(each.encode(text, eos=True)) == text
    if "<unk>" not in text:  # which is shown as SentencePiece shows it, not by name
        assert each.decode(each.encode(text, bos=False, specials=True), specials=True) == text


def test_every_character_survives(each: Tokenizer) -> None:
    """All planes, in stretches of 4,096 characters, in the first plane with letters between."""
    valid = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000 and c != 0x2581]
    for start in range(0, len(valid), 4096):
        stretch = valid[start : start + 4096]
        text = ("a" if start < 0x10000 else "").join(stretch)
        assert each.decode(each.encode(text)) == text


@RELAXED
@given(text=TEXTS, data=st.data())
def test_prompt_and_continuation_read_as_the_whole(each: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = each.encode(text)
    cut = data.draw(st.integers(1 if each.bos_id is not None else 0, len(ids)))
    head = each.stream()
    said = "".join(map(head.push, ids[:cut]))
    rest = "".join(map(head.push, ids[cut:])) + head.flush()
    assert said + rest == text
    try:
        said.encode()
    except UnicodeEncodeError:
        pytest.fail("half a character")
    if cut > 1 and "\ufffd" not in each.decode(ids[:cut]):
        assert each.decode(ids[:cut]) + each.decode(ids[cut:], continuation=True) == text


def test_a_stream_of_any_ids_gives_what_decoding_gives(each: Tokenizer) -> None:
    draw = random.Random(1)
    pool = [*range(min(300, each.vocab_size))] * 2 + [*range(each.vocab_size)]
    for _ in range(1000):
        ids = draw.choices(pool, k=draw.randint(0, 12))
        for specials in (False, True):
            for continuation in (False, True):
                stream = each.stream(specials, continuation)
                pieces = [stream.push(index) for index in ids] + [stream.flush()]
                assert "".join(pieces) == each.decode(ids, specials, continuation)


def test_a_stream_never_shows_half_a_character(each: Tokenizer) -> None:
    text = "日本é😀 ok 👩‍👩‍👧‍👦"
    stream = each.stream()
    shown = ""
    for index in each.encode(text):
        shown += stream.push(index)
        assert text.startswith(shown)
    assert shown + stream.flush() == text


def test_a_stream_cut_within_a_character_ends_with_u_fffd(small: Tokenizer, ranked: Tokenizer) -> None:
    """SentencePiece shows one for each byte, tiktoken one for the unfinished character."""
    assert small.decode(small.encode("a😀")[:-1]) == "a\ufffd\ufffd\ufffd"
    assert ranked.decode(ranked.encode("a😀")[:-1]) == "a\ufffd"


def test_batches_give_what_single_calls_give(each: Tokenizer, hard: list[str]) -> None:
    for options in ({}, {"bos": False}, {"eos": True}, {"specials": True}):
        single = [each.encode(text, **options) for text in hard]
        assert each.encode_batch(hard, threads=2, **options) == single
        assert each.encode_batch(hard, threads=1, **options) == single
    assert each.encode_batch([]) == []


def test_bos_once_and_eos_only_if_asked(each: Tokenizer) -> None:
    assert each.encode("") == [each.bos_id]
    assert each.encode("", bos=False) == []
    assert each.encode("", eos=True) == [each.bos_id, each.eos_id]
    bos = next(name for name, index in each.specials.items() if index == each.bos_id)
    assert each.encode(f"{bos}a", specials=True) == each.encode("a")


@pytest.mark.parametrize("index", [-1, 10**9])
def test_ids_outside_the_vocabulary(each: Tokenizer, index: int) -> None:
    for call in (each.piece, each.token_bytes, each.stream().push, lambda index: each.decode([1, index])):
        with pytest.raises(TokenizerError, match=f"id {index} is not in the vocabulary: expected 0 to "):
            call(index)


def test_token_bytes_join_to_the_text(each: Tokenizer, hard: list[str]) -> None:
    for text in hard[:200]:
        joined = b"".join(each.token_bytes(index) for index in each.encode(text, bos=False))
        prefix = b"" if each.kind == "tiktoken" or not text else b" "
        assert joined == prefix + text.encode()

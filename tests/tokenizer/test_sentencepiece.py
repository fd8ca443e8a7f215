"""SentencePiece files: the library's own ids and text, in every corner."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import sentencepiece

from puna.errors import TokenizerError
from puna.tokenizer import protobuf
from puna.tokenizer.reading import load
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def library(small_directory: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(small_directory / "tokenizer.model"))


def test_ids_and_text_are_the_librarys(
    small: Tokenizer, library: sentencepiece.SentencePieceProcessor, hard: list[str]
) -> None:
    for text in [*hard, "a▁b", "▁", " ▁ "]:
        ids = library.encode(text)
        assert small.encode(text, bos=False) == ids, text
        assert small.decode(ids) == library.decode(ids), text


def test_any_ids_decode_as_in_the_library(
    small: Tokenizer, library: sentencepiece.SentencePieceProcessor
) -> None:
    draw = random.Random(0)
    byte_heavy = [*range(3, 259)] * 3 + [*range(small.vocab_size)]
    for _ in range(3000):
        ids = draw.choices(byte_heavy, k=draw.randint(1, 9))
        assert small.decode(ids) == library.decode(ids), ids


def test_llama2_ids(assets: Path) -> None:
    llama2 = load(assets / "tokenizers/llama2/tokenizer.model")
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id, llama2.unk_id) == (32_000, 1, 2, 0)
    expected = {
        "Hello world": [1, 15043, 3186],
        "": [1],
        "\n": [1, 29871, 13],
        "1234": [1, 29871, 29896, 29906, 29941, 29946],
        "<s>": [1, 529, 29879, 29958],
        " a": [1, 29871, 263],
    }
    assert {text: llama2.encode(text) for text in expected} == expected
    assert llama2.encode("<s>a</s>", specials=True) == [1, 263, 2]


def test_llama2_is_the_library_on_real_text(assets: Path, hard: list[str], real_lines: list[str]) -> None:
    path = assets / "tokenizers/llama2/tokenizer.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = hard + real_lines
    llama2 = load(path)
    rows = llama2.encode_batch(texts, bos=False)
    assert rows == library.encode(texts)
    assert [llama2.decode(row) for row in rows] == library.decode(rows)


def test_extra_spaces_go_where_the_file_says_so(assets: Path) -> None:
    stories = load(assets / "weights/stories260K/tok512.model")
    assert stories.decode(stories.encode("  a   b  ")) == "a b"


def test_placeholder_reads_as_a_space_and_surrogates_as_u_fffd(small: Tokenizer) -> None:
    assert small.encode("a▁b") == small.encode("a b")
    assert small.encode("a\ud800b") == small.encode("a\ufffdb")
    assert small.encode("\ud83d\ude00") == small.encode("😀")  # a pair is one character


def test_special_names_in_text_stay_text(small: Tokenizer) -> None:
    assert not {0, 1, 2} & set(small.encode("<s>a</s><unk>", bos=False))
    assert small.encode("<s>a</s>b", specials=True) == [
        1,
        *small.encode("a", bos=False),
        2,
        *small.encode("b", bos=False),
    ]


def _with_symbol(data: bytes, name: str) -> tuple[bytes, int]:
    """The model with its last piece turned into a user-defined symbol; all its fields are short."""
    model = protobuf.parse_model(data)
    last = model.pieces[-1].text.encode()
    old = data.rindex(b"\x0a" + bytes([len(last)]) + last)
    score = data[old + 2 + len(last) : old + 7 + len(last)]  # tag and float
    text = name.encode()
    body = b"\x0a" + bytes([len(text)]) + text + score + b"\x18\x04"
    changed = data[: old - 1] + bytes([len(body)]) + body + data[old + 7 + len(last) :]
    return changed, len(model.pieces) - 1


def test_user_defined_symbols_are_special_too(small_directory: Path) -> None:
    data, index = _with_symbol((small_directory / "tokenizer.model").read_bytes(), "<|user|>")
    plain = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert index in plain.encode("a<|user|>b")  # what the library does with such a symbol
    ours = Tokenizer(SentencePieceCodec(data))
    assert ours.specials["<|user|>"] == index
    assert index not in ours.encode("a<|user|>b")
    assert ours.decode(ours.encode("a<|user|>b")) == "a<|user|>b"
    assert index in ours.encode("a<|user|>b", specials=True)
    declared = Tokenizer(SentencePieceCodec(data, plain=frozenset({"<|user|>"})))
    assert declared.encode("a<|user|>b", bos=False) == plain.encode("a<|user|>b")
    with pytest.raises(TokenizerError, match="user-defined symbols"):
        declared.save(small_directory / "refused")


def test_pickled_is_the_same(each: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(each))
    assert copy.fingerprint == each.fingerprint
    assert copy.encode("a <s>é\n", eos=True) == each.encode("a <s>é\n", eos=True)

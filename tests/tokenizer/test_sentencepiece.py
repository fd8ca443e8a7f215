"""SentencePiece files: the library's own ids and text, in every corner."""

from __future__ import annotations

import json
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

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


def test_pieces_are_the_same_however_they_are_written(small_directory: Path) -> None:
    data = (small_directory / "tokenizer.model").read_bytes()
    entries = [part for part in protobuf._fields(data, 0, len(data)) if part.number == 1]  # private: its twin
    assert [protobuf._any_piece(data, entry) for entry in entries] == protobuf.parse_model(data).pieces
    long = "b" * 200
    for text, kind, rest in [("", 6, b""), (long, 4, b""), ("é", 3, b"\x20\x07"), ("a", 200, b"")]:
        name = text.encode()
        size = bytes([len(name)]) if len(name) < 128 else bytes([len(name) & 127 | 128, len(name) >> 7])
        number = bytes([kind]) if kind < 128 else bytes([kind & 127 | 128, kind >> 7])
        body = b"\x0a" + size + name + b"\x15" + struct.pack("<f", -1.5) + b"\x18" + number + rest
        found = protobuf._piece(body, protobuf._Field(1, 2, 0, len(body)))
        assert found == protobuf.Piece(text, -1.5, kind, len(body) - 1 - len(rest))
        other = b"\x15" + struct.pack("<f", 0.5) + b"\x0a" + size + name
        found = protobuf._piece(other, protobuf._Field(1, 2, 0, len(other)))
        assert found == protobuf.Piece(text, 0.5, protobuf.NORMAL, None)


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


def _beside(small_directory: Path, tmp_path: Path, added: Any, **config: Any) -> Path:
    (tmp_path / "tokenizer.model").write_bytes((small_directory / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_tokens_beyond_the_model(
    small: Tokenizer, small_directory: Path, tmp_path: Path, hard: list[str]
) -> None:
    """As Alpaca and Vicuna add them: the pieces stay as they are, and the new ones are special."""
    ours = load(_beside(small_directory, tmp_path, {"<|im_end|>": 601, "[PAD]": 600}))
    assert (ours.kind, ours.vocab_size, ours.end_ids) == ("SentencePiece", 602, (2, 601))
    assert ours.specials == {**small.specials, "[PAD]": 600, "<|im_end|>": 601}
    assert ours.encode_batch(hard) == small.encode_batch(hard)
    assert ours.encode("a[PAD]b") == small.encode("a[PAD]b")
    assert ours.encode("a[PAD]b", specials=True) == [
        *small.encode("a"),
        600,
        *small.encode("b", bos=False),
    ]
    assert ours.decode([1, 600, 601, *small.encode("a", bos=False)], specials=True) == "<s>[PAD]<|im_end|>a"
    assert ours.fingerprint != small.fingerprint


def test_tokens_beyond_the_model_survive_saving(
    small_directory: Path, tmp_path: Path, hard: list[str]
) -> None:
    ours = load(_beside(small_directory, tmp_path, {"[PAD]": 600, "<|x|>": 601}))
    ours.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.fingerprint, again.specials) == (ours.fingerprint, ours.specials)
    (tmp_path / "saved" / "tokenizer.model").unlink()
    modern = load(tmp_path / "saved")
    assert (modern.kind, modern.specials) == ("tokenizer.json", ours.specials)
    texts = [*hard, "a[PAD]b <|x|> c", "[PAD]"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == ours.vocab_size
    for kept in (again, modern):
        assert kept.encode_batch(texts) == ours.encode_batch(texts)
        assert kept.encode_batch(texts, specials=True) == ours.encode_batch(texts, specials=True)
    assert theirs(texts, split_special_tokens=True)["input_ids"] == ours.encode_batch(texts)
    parsed = theirs(texts, add_special_tokens=False)["input_ids"]
    assert parsed == ours.encode_batch(texts, bos=False, specials=True)


def test_the_same_tokens_in_either_file(small_directory: Path, tmp_path: Path) -> None:
    for name in ("listed", "decoder"):
        (tmp_path / name).mkdir()
    listed = load(_beside(small_directory, tmp_path / "listed", {"<|x|>": 600}))
    table = {"600": {"content": "<|x|>", "special": True}}
    decoder = load(_beside(small_directory, tmp_path / "decoder", {}, added_tokens_decoder=table))
    assert decoder.fingerprint == listed.fingerprint
    table["600"]["content"] = "<|y|>"
    other = load(_beside(small_directory, tmp_path / "decoder", {}, added_tokens_decoder=table))
    assert other.fingerprint != listed.fingerprint


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<|x|>": 601}, "add a token with id 601, and not all from 600"),
        ({"<|x|>": 600, "<|y|>": 602}, "add a token with id 602, and not all from 600"),
        ({"<|x|>": 600, "<|y|>": 600}, "'<|y|>' must map a token to an id of its own"),
        ({"<|x|>": True}, "must map a token to an id"),
        ({"<|x|>": "600"}, "must map a token to an id"),
        ({"<|x|>": 600.0}, "must map a token to an id"),
        ({"<|x|>": -1}, "must map a token to an id"),
        ({"<|x|>": 2**22}, "must map a token to an id"),
        ({"": 600}, "must map a token to an id"),
        ({"x" * 1000: None}, "must map a token to an id"),
        ({"<s>": 600}, "not a SentencePiece model: "),
        ([1], "expected a JSON object"),
    ],
)
def test_added_tokens_that_do_not_follow(
    added: Any, message: str, small_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError) as caught:
        load(_beside(small_directory, tmp_path, added))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_tokens_of_the_model_may_be_listed_again(
    small: Tokenizer, small_directory: Path, tmp_path: Path
) -> None:
    ours = load(_beside(small_directory, tmp_path, {"<s>": 1, "</s>": 2}))
    assert ours.fingerprint == small.fingerprint


def test_pickled_is_the_same(each: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(each))
    assert copy.fingerprint == each.fingerprint
    assert copy.encode("a <s>é\n", eos=True) == each.encode("a <s>é\n", eos=True)

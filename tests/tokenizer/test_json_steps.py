"""Steps of a tokenizer.json that make long texts of short ones, and tables that lie: refused unread."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, pre_tokenizers

from puna.errors import TokenizerError
from puna.tokenizer.json_steps import MOST_GROWTH, check_steps
from puna.tokenizer.reading import load

GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
CHARACTERS = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
METASPACE = {"type": "Metaspace", "prepend_scheme": "always", "split": False}


def _sequence(role: str, steps: list[Any]) -> dict[str, Any]:
    plural = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[role]
    return {role: {"type": "Sequence", plural: steps}}


def _table(trie: bytes, texts: bytes, size: int | None = None) -> str:
    length = len(trie) if size is None else size
    return base64.b64encode(length.to_bytes(4, "little") + trie + texts).decode()


@pytest.mark.parametrize(
    "document",
    [
        _sequence("normalizer", [{"type": "Prepend", "prepend": "a"}, *[GROWING] * 3]),
        _sequence("normalizer", [{"prepend": "a" * 300}]),
        _sequence("normalizer", [{key: GROWING[key] for key in ("pattern", "content")}] * 3),
        _sequence("normalizer", [_sequence("normalizer", [GROWING, GROWING])["normalizer"], GROWING]),
        _sequence("normalizer", [{**GROWING, "pattern": {"Regex": "b|(?=a)"}}] * 3),
        _sequence("normalizer", [{**GROWING, "pattern": {"String": ""}}] * 3),
        _sequence("normalizer", [{"type": "NFKD"}, {**GROWING, "content": "\ufdfa"}] * 2),
        _sequence("normalizer", [{"type": "ByteLevel"}] * 9),
        _sequence("pre_tokenizer", [{"type": "ByteLevel", "add_prefix_space": True}] * 9),
        _sequence("pre_tokenizer", [CHARACTERS, *({**METASPACE, "replacement": c} for c in "ABCDEFGHI")]),
        _sequence("decoder", [{**GROWING, "content": "a" * 100}] * 6),
        {
            **_sequence("normalizer", [GROWING, GROWING]),
            **_sequence("pre_tokenizer", [{"type": "ByteLevel"}]),
        },
        {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": _table(b"\0" * 4, b"a\0" + b"b" * 300),
            }
        },
    ],
)
def test_texts_that_would_grow_without_bound(document: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"can make a text more than 256 times as long$"):
        check_steps(document)


@pytest.mark.parametrize(
    "document",
    [
        {},
        # Llama 2, T5, Gemma, Llama 3, GPT-2 and BERT, as their files say it
        _sequence("normalizer", [{"type": "Prepend", "prepend": "▁"}, {**GROWING, "content": "▁"}]),
        {
            **_sequence(
                "normalizer",
                [
                    {"type": "Precompiled", "precompiled_charsmap": _table(b"\0" * 4, b"a\0" + b"b" * 18)},
                    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
                ],
            ),
            "pre_tokenizer": {**METASPACE, "replacement": "▁"},
        },
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}},
        _sequence("pre_tokenizer", [CHARACTERS, {"type": "ByteLevel", "add_prefix_space": False}]),
        {"normalizer": {"type": "NFKC"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"normalizer": {"type": "BertNormalizer", "lowercase": True}},
        _sequence("normalizer", [{**GROWING, "pattern": {"String": "a" * 10}}] * 20),
    ],
)
def test_what_published_files_do_is_let_through(document: dict[str, Any]) -> None:
    check_steps(document)


@pytest.mark.parametrize("kind", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase"])
def test_no_character_becomes_more_than_is_counted(kind: str) -> None:
    """Were the factors too small, a chain could be longer than the bound says."""
    step = getattr(normalizers, kind)()
    longest = max(
        len(step.normalize_str(chr(code))) for code in range(0x20000) if not 0xD800 <= code < 0xE000
    )
    rest = {"type": "Prepend", "prepend": "a" * (MOST_GROWTH + 1 - longest)}
    with pytest.raises(TokenizerError, match="more than 256 times"):
        check_steps(_sequence("normalizer", [{"type": kind}, rest]))


def test_byte_level_grows_as_counted() -> None:
    cut = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    longest = max(sum(len(part) for part, _ in cut.pre_tokenize_str(text)) for text in "aé日😀")
    assert longest == 5


@pytest.mark.parametrize(
    "table",
    [
        "AAAA",
        "",
        "/////w==",
        "not base 64",
        "AAAAA",
        7,
        [0, 0, 0, 0],
        None,
        _table(b"", b"abc\0"),
        _table(b"\0" * 4, b"", size=8),
        _table(b"\0" * 4, b"", size=2**32 - 4),
        _table(b"\0" * 3, b"abc"),
        _table(b"\0" * 4, b"\xff\xff"),
    ],
)
def test_a_table_that_holds_less_than_it_says(
    table: Any, small_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library would end in a panic, whose words go to the terminal before any of ours."""
    document = json.loads((small_directory / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"its precompiled_charsmap is damaged$"):
        load(tmp_path)
    assert capfd.readouterr().err == ""

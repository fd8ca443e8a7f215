"""Files that are no tokenizer, or a damaged one: one line that says so, and never a crash."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import reading
from puna.tokenizer.reading import load

Change = Callable[[bytes], bytes]


def _refused(path: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path.parent)) and len(message) < 600
    return message


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "anything"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n ",
        b"hello",
        b"\0" * 100,
        b"\x80\x04\x95pickle",
        b"PK\x03\x04zip",
        b"{",
        b"{}",
        b"[1]",
        b"\xff\xfe{",
        b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01x",
        b"\n\x80",
        b'{"model": 1}',
        b"GGUF\x03\0\0\0",
        bytes(range(256)),
    ],
)
def test_not_a_tokenizer(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such file" in _refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    message = _refused(tmp_path / "empty")
    assert "no tokenizer here; expected tokenizer.model or tokenizer.json" in message


def test_too_large_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SIZE_LIMIT", 10)
    (tmp_path / "tokenizer.model").write_bytes(b"x" * 11)
    assert "no tokenizer file is larger" in _refused(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("kind", ["small", "ranked", "modern"])
def test_cut_short(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """At any place: refused, except where what is left is whole in itself (a list without its last rows)."""
    request.getfixturevalue(kind).save(tmp_path / "whole")
    name = "tokenizer.json" if kind == "modern" else "tokenizer.model"
    data = (tmp_path / "whole" / name).read_bytes()
    for share in range(1, 30):
        path = tmp_path / name
        path.write_bytes(data[: len(data) * share // 31])
        if kind == "ranked":
            _refused_or_usable(path)
        else:
            _refused(path)


@pytest.mark.parametrize("kind", ["small", "ranked", "modern"])
def test_flipped_bits(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Whatever still loads must work; everything else is refused in one line."""
    request.getfixturevalue(kind).save(tmp_path / "whole")
    name = "tokenizer.json" if kind == "modern" else "tokenizer.model"
    data = (tmp_path / "whole" / name).read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 4, 64])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(bytes(changed))
        _refused_or_usable(tmp_path / name)


def _refused_or_usable(path: Path) -> None:
    try:
        tokenizer = load(path)
    except TokenizerError as error:
        assert "\n" not in str(error)
        return
    ids = tokenizer.encode("hello the\n é12", eos=tokenizer.eos_id is not None)
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"YQ== 0\nYQ== 1\n", "line 2 of the ranks: expected a new token with rank 1"),
        (b"YQ== 0\nYg== 2\n", "expected a new token with rank 1"),
        (b"YQ== 0\nYg== one\n", "line 2 of the ranks is not a token in base 64"),
        (b"YQ== 0\nYWI 1\n", "line 2 of the ranks is not valid base 64"),
        (b"YQ== 0\n", "lack 255 of the 256 single bytes"),
    ],
)
def test_bad_ranks(rows: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(rows)
    assert message in _refused(tmp_path / "tokenizer.model")


def _change(document: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**document, key: value}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"type": "WordPiece", "vocab": {}}, "expected a BPE vocabulary, found 'WordPiece'"),
        ("model", {"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}, "is not a number from 0"),
        ("model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}, "is not a number from 0"),
        (
            "model",
            {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
            "not a tokenizer.json that can be used",
        ),
        ("model", {"type": "BPE", "vocab": 3, "merges": []}, "vocabulary"),
        ("added_tokens", {"a": 1}, "added_tokens must be a list"),
        ("added_tokens", [{"content": "x"}], "missing field `id`"),
        ("decoder", None, "neither a byte-level nor"),
    ],
)
def test_bad_tokenizer_json(
    key: str, value: Any, message: str, small_directory: Path, tmp_path: Path
) -> None:
    document = json.loads((small_directory / "tokenizer.json").read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**document, key: value}), encoding="utf-8")
    assert message in _refused(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("generation_config.json", b"nothing"),
        ("special_tokens_map.json", b"1"),
        ("chat_template.jinja", b"\xff"),
        ("config.json", b"[" * 100_000),
    ],
)
def test_bad_files_beside_it(name: str, content: bytes, small_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((small_directory / "tokenizer.model").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_special_tokens_of_one_name(ranked_directory: Path, tmp_path: Path) -> None:
    data = (ranked_directory / "tokenizer.model").read_bytes()
    first = len(data.splitlines())
    (tmp_path / "tokenizer.model").write_bytes(data)
    table = {str(first + 2): {"content": "<|x|>"}, str(first + 3): {"content": "<|x|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": table}))
    with pytest.raises(TokenizerError, match="two special tokens have the same name"):
        load(tmp_path)
    assert base64.b64decode(data.split()[0]) == b"\0"
